"""YaRN, dynamic NTK, LogN and the temperature: published values, the definitions in float64, and what they act on."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.long_context import DualChunk, V1Lengths, Yarn
from qwen_jax.ops import rope, rope_scaling, segments

OFF = dict(yarn=Yarn(), chunks=DualChunk(), v1=V1Lengths())


@pytest.mark.parametrize("head_dim, theta, length, low, high", [
    (128, 1e6, 32_768, 23, 40), (64, 1e6, 32_768, 11, 20), (128, 1e7, 262_144, 28, 43), (128, 1e4, 2048, 16, 41),
])  # fmt: skip
def test_yarn_leaves_fast_pairs_alone_and_stretches_slow_ones(head_dim, theta, length, low, high):
    plain = rope.frequencies(head_dim, theta)
    found, factor = rope_scaling.yarn_frequencies(head_dim, theta, Yarn(4.0, length))
    ratio = found / plain
    assert (ratio[: low + 1] == 1).all() and ratio[low + 1] < 1
    assert ratio[high - 1] > 0.25
    np.testing.assert_allclose(ratio[high:], 0.25, rtol=1e-12)
    np.testing.assert_allclose(np.diff(ratio[low : high + 1]), -0.75 / (high - low), rtol=1e-9)
    assert factor == pytest.approx(1.138629, abs=1e-6)


def test_yarn_gives_the_published_frequencies():
    found, _ = rope_scaling.yarn_frequencies(128, 1e6, Yarn(4.0, 32_768))
    expected = [1.0, 3.16227766e-2, 6.02941176e-4, 7.90569415e-6, 3.10234440e-7]
    np.testing.assert_allclose(found[[0, 16, 32, 48, 63]], expected, rtol=2e-7)  # float32


def test_the_factor_on_cos_and_sin():
    factor = lambda **fields: rope_scaling.yarn_frequencies(64, 1e4, Yarn(**fields))[1]
    assert factor() == 1.0
    assert factor(factor=16.0) == pytest.approx(0.1 * math.log(16) + 1)
    assert factor(factor=16.0, attention_factor=0.7) == 0.7
    ratio = (0.1 * 0.5 * math.log(16) + 1) / (0.1 * 2 * math.log(16) + 1)
    assert factor(factor=16.0, mscale=0.5, mscale_all_dim=2.0) == pytest.approx(ratio)
    assert factor(factor=16.0, mscale=0.5) == factor(factor=16.0)
    same = rope_scaling.yarn_frequencies(64, 1e4, Yarn())[0]
    np.testing.assert_array_equal(same, rope.frequencies(64, 1e4))


def test_yarn_multiplies_logits_by_the_square_of_its_factor():
    q, positions = np.random.default_rng(0).normal(size=(1, 5, 2, 64)).astype(np.float32), jnp.arange(5)[None]
    sharp, soft = (
        rope_scaling.rotation(
            positions, positions, head_dim=64, theta=1e4, **(OFF | {"yarn": Yarn(4.0, 64, attention_factor=factor)})
        )
        for factor in (1.5, 1.0)
    )
    logits = lambda turn: np.einsum("btnh,bsnh->btns", turn.queries(q), turn.keys(q))
    np.testing.assert_allclose(logits(sharp), 2.25 * logits(soft), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields, message", [
    (dict(factor=0.5), "yarn.factor is 0.5; expected at least 1"),
    (dict(factor=math.nan), "yarn.factor is nan"),
    (dict(factor=2.0, original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
    (dict(factor=2.0, beta_fast=1.0, beta_slow=2.0), "beta_fast is 1.0 and yarn.beta_slow 2.0"),
    (dict(factor=2.0, attention_factor=0.0), "attention_factor is 0.0"),
], ids=str)  # fmt: skip
def test_impossible_yarn_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Yarn(**fields)


def test_alpha_of_dynamic_ntk_jumps_behind_the_powers_of_two():
    published = {1: 1, 1024: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15, 16_384: 15}
    found = rope_scaling.ntk_alpha(jnp.array(list(published)), 2048)
    assert found.tolist() == list(published.values())
    lengths = np.arange(1, 3000)
    exact = [max(2 ** math.ceil(math.log2(n / 37) + 1) - 1, 1) if n > 37 else 1 for n in lengths]
    assert rope_scaling.ntk_alpha(jnp.asarray(lengths), 37).tolist() == exact


def test_dynamic_ntk_raises_the_base_by_the_prompt_of_each_document():
    v1 = V1Lengths(8, use_dynamic_ntk=True)
    positions = jnp.array([[3, 11, 20]])
    found = rope_scaling.rotation(positions, jnp.array([[8, 9, 17]]), head_dim=16, theta=1e4, **(OFF | {"v1": v1}))
    for t, alpha in enumerate((1, 3, 7)):
        angles = int(positions[0, t]) * rope.frequencies(16, 1e4 * alpha ** (16 / 14))
        np.testing.assert_allclose(found.k_cos[0, t], np.cos(angles), atol=3e-6)
        np.testing.assert_allclose(found.q_sin[0, t], np.sin(angles), atol=3e-6)


def test_logn_multiplies_queries_behind_the_length_of_training():
    found = rope_scaling.logn(jnp.array([0, 100, 2047, 4095, 8191, 16_383]), 2048)
    np.testing.assert_allclose(found, [1, 1, 1, 1.090909, 1.181818, 1.272727], atol=1e-6)
    positions, v1 = jnp.array([[2, 63]]), V1Lengths(8, use_logn_attn=True)
    turn, plain = (
        rope_scaling.rotation(positions, positions + 1, head_dim=8, theta=1e4, **(OFF | {"v1": x}))
        for x in (v1, V1Lengths())
    )
    np.testing.assert_allclose(turn.q_cos, plain.q_cos * np.array([1.0, 2.0])[None, :, None], atol=1e-6)
    np.testing.assert_array_equal(turn.k_cos, plain.k_cos)


def test_the_temperature_of_a_million_tokens():
    lengths = jnp.array([1, 262_144, 524_288, 1_010_000, 1_048_576])
    m = rope_scaling.temperature(lengths, 262_144)
    np.testing.assert_allclose(m, [1, 1, 1.069315, 1.134881, 1.138629], atol=1e-6)
    np.testing.assert_allclose(m[2:] ** 2, [1.143434, 1.287955, 1.296477], atol=2e-6)


def test_the_temperature_is_the_prompts_and_then_the_lengths_so_far():
    positions, prompts = jnp.array([[0, 19, 20, 39]]), jnp.array([[20, 20, 20, 20]])
    tables = [
        rope_scaling.rotation(positions, prompts, head_dim=8, theta=1e4, **(OFF | {"chunks": DualChunk(16, 4, n)}))
        for n in (16, 0)
    ]
    expected = 1 + 0.1 * np.log(np.array([20, 20, 21, 40]) / 16)
    hot, cold = ([x.k_cos, *x.q_cos] for x in tables)
    for found, plain in zip(hot, cold, strict=True):
        np.testing.assert_allclose(found, plain * expected[None, :, None], rtol=1e-5, atol=1e-6)


def test_v1_lengths_need_the_length_of_training():
    with pytest.raises(InputError, match="seq_length is 0"):
        V1Lengths(use_logn_attn=True)


def test_a_document_is_as_long_as_its_last_position_says():
    ids = jnp.array([[0, 0, 5, 5, 5, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    positions = segments.positions(ids)
    found = segments.lengths(positions, ids)
    assert found.tolist() == [[2, 2, 3, 3, 3, 2, 2, 1], [8] * 8]
    assert segments.lengths(positions + 7, ids)[1].tolist() == [15] * 8
