"""Chunked log-probabilities equal the plain ones, in value and gradient, and never hold the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import sharding
from qwen_jax.ops.cross_entropy import token_log_probs


def plain(hidden_BTD, head_VD, targets_BT):
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]


def inputs(B, T, D, V, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, scale, shape).astype(np.float32)
    return draw(B, T, D), draw(V, D), rng.integers(0, V, (B, T)).astype(np.int32), draw(B, T)


def by_hand(hidden_BTD, head_VD, targets_BT, weights_BT):
    """Values, and the gradients of their weighted sum, in float64: of the logits it is target less probability."""
    hidden_BTD, head_VD = hidden_BTD.astype(np.float64), head_VD.astype(np.float64)
    logits_BTV = hidden_BTD @ head_VD.T
    log_probs_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, axis=-1, keepdims=True)
    target_BTV = np.eye(len(head_VD))[targets_BT]
    d_BTV = weights_BT[..., None] * (target_BTV - np.exp(log_probs_BTV))
    gradients = d_BTV @ head_VD, np.einsum("BTV,BTD->VD", d_BTV, hidden_BTD)
    return (log_probs_BTV * target_BTV).sum(-1), gradients


@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(1, 3), T=st.integers(1, 4), D=st.sampled_from([1, 5]), V=st.integers(1, 41), chunks=st.integers(1, 9),
    parts=st.sampled_from([1, 2, 4]), joined=st.booleans(), keep=st.booleans(),
)  # fmt: skip
def test_equal_to_log_softmax_for_any_vocabulary_and_chunking(B, T, D, V, chunks, parts, joined, keep):
    hidden, head, targets, weights = inputs(B, T, D, V)

    @jax.jit
    def value_and_gradients(hidden, head, targets, weights):
        how = dict(chunks=chunks, parts=parts, joined=joined, keep=keep)
        chunked = lambda hidden, head: token_log_probs(hidden, head, targets, **how)
        value, pull = jax.vjp(chunked, hidden, head)
        return value, pull(weights)

    expected = by_hand(hidden, head, targets, weights)
    found = value_and_gradients(hidden, head, targets, weights)
    # float32 sums of float32 products: a few units in the last place of the larger entries.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_logits_of_a_thousand_do_not_overflow():
    hidden, head, targets, _ = inputs(1, 3, 8, 33, scale=30.0)
    np.testing.assert_allclose(
        token_log_probs(hidden, head, targets), plain(hidden, head, targets), rtol=1e-5, atol=1e-3
    )


def test_memory_is_that_of_one_chunk():
    B, T, D, V = 2, 64, 16, 16_384
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, D), (V, D))]
    targets = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def temporary_bytes(function):
        loss = lambda hidden, head, targets: function(hidden, head, targets).sum()
        return jax.jit(jax.grad(loss, (0, 1))).lower(*structs, targets).compile().memory_analysis().temp_size_in_bytes

    logits = B * T * V * 4
    assert temporary_bytes(plain) > logits
    # A chunk is an eighth; a few of its size are alive at once (logits, probabilities), nothing of the whole size.
    assert temporary_bytes(token_log_probs) < 0.6 * logits


def test_kept_logits_save_a_product_of_four():
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64, 32), (1024, 32))]
    targets = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def products(keep):
        loss = lambda hidden, head, targets: token_log_probs(hidden, head, targets, joined=True, keep=keep).sum()
        return jax.jit(jax.grad(loss, (0, 1))).lower(*structs, targets).as_text().count("dot_general")

    assert (products(False), products(True)) == (4, 3)


@pytest.mark.parametrize("tensor", [2, 4])
def test_split_vocabulary_equals_one_device_and_stays_split(tensor):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=-1, tensor=tensor))
    layout = sharding.Layout(mesh)
    hidden, head, targets, _ = inputs(8, 4, 16, 128)
    put = lambda x, names: jax.device_put(x, layout.sharding(names, x.shape))
    args = (
        put(hidden, ("batch", "length", "act_embed")),
        put(head, ("vocab", "embed")),
        put(targets, ("batch", "length")),
    )
    split = jax.jit(lambda *args: token_log_probs(*args, chunks=4, parts=layout.size("vocab")))
    np.testing.assert_allclose(split(*args), plain(hidden, head, targets), atol=1e-4)
    # No device gathers the rows of the others: each all-gather is over the width (fsdp), at most V / tensor rows.
    for line in split.lower(*args).compile().as_text().splitlines():
        assert not ("all-gather(" in line and "f32[128,16]" in line), line


@pytest.mark.parametrize("V, chunks, parts", [(41, 4, 1), (64, 8, 2)])
def test_a_frozen_head_gives_the_same_gradient_of_the_hidden_state(V, chunks, parts):
    hidden, head, targets, weights = inputs(2, 5, 6, V)
    gradient = lambda function: jax.jit(jax.grad(lambda hidden: (function(hidden, head, targets) * weights).sum()))
    found = gradient(functools.partial(token_log_probs, chunks=chunks, parts=parts))(hidden)
    np.testing.assert_allclose(found, gradient(plain)(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_rows_stand_for_those_of_the_head(frozen):
    hidden, head, targets, weights = inputs(2, 9, 6, 23)
    ids, rows = np.array([4, 22, 0]), 2 * inputs(1, 3, 6, 3)[1]
    targets[0, :3] = ids

    def value_and_gradients(function):
        over = (0, 2) if frozen else (0, 1, 2)
        return jax.jit(jax.value_and_grad(lambda *args: (function(*args) * weights).sum(), over))(hidden, head, rows)

    expected = value_and_gradients(lambda hidden, head, rows: plain(hidden, head.at[ids].set(rows), targets))
    found = value_and_gradients(
        lambda hidden, head, rows: token_log_probs(hidden, head, targets, chunks=3, rows=(ids, rows))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)
