"""Kernels in few bits: codes against a naive search, the error's closed form, levels from the normal distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from qwen_jax.ops import quantisation

quantise = jax.jit(quantisation.quantise, static_argnames=("kind", "stacked", "inputs"))
dequantise = jax.jit(functools.partial(quantisation.dequantise, dtype=jnp.float32))
WIDEST = {"nf4": (1 - 0.6961928009986877) / 2, "int8": 0.5}  # half the widest gap between levels, in scales


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E: eight even steps of probability below 0 and seven above, with a level of exactly 0 between."""
    edge = 0.9677083  # 1 - (1/30 + 1/32) / 2
    above, below = norm.ppf(np.linspace(edge, 0.5, 9)[:-1]), -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, below, [0.0]])) / above.max()
    np.testing.assert_allclose(quantisation.NF4, expected, atol=2e-6)


@pytest.mark.parametrize("shape, inputs, scales", [((2, 128, 3), 1, (2, 2, 3)), ((1, 2, 96, 5), 2, (1, 2, 3, 5))])
def test_nf4_is_the_nearest_level_of_each_block(shape, inputs, scales):
    """The naive way: one value of one block of 64 (32 where the axis is 96) after the other."""
    kernel = drawn(shape)
    found = quantise(kernel, kind="nf4", stacked=1, inputs=inputs)
    assert found["scales"].shape == scales and found["codes"].nbytes == kernel.size / 2
    whole = np.asarray(dequantise(**found))
    axis, block = inputs, shape[inputs] // scales[inputs]
    for place in np.ndindex(shape):
        start = place[axis] // block * block
        row = kernel[(*place[:axis], slice(start, start + block), *place[axis + 1 :])]
        peak = np.abs(row).max()
        nearest = np.argmin(np.abs(np.array(quantisation.NF4) - kernel[place] / peak))
        assert whole[place] == pytest.approx(quantisation.NF4[nearest] * peak, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(quantisation.KINDS), st.integers(0, 99), st.sampled_from([1e-6, 1.0, 1e4]))
def test_no_value_is_off_by_more_than_half_the_widest_gap(kind, seed, size):
    kernel = drawn((1, 64, 4), seed) * size
    found = quantise(kernel, kind=kind, stacked=1, inputs=1)
    error = np.abs(np.asarray(dequantise(**found)) - kernel)
    assert np.all(error <= np.asarray(found["scales"]) * WIDEST[kind] * 1.0001)


@pytest.mark.parametrize("kind", quantisation.KINDS)
def test_extremes_and_zeros_are_exact(kind):
    kernel = np.zeros((1, 64, 2), np.float32)
    kernel[0, 3, 0], kernel[0, 9, 0] = -0.5, 0.5
    found = quantise(kernel, kind=kind, stacked=1, inputs=1)
    np.testing.assert_allclose(dequantise(**found), kernel, rtol=1e-6)


@pytest.mark.parametrize("kind", quantisation.KINDS)
def test_the_product_and_its_gradient_are_those_of_the_kernel_the_codes_stand_for(kind):
    kernel, x = drawn((64, 3, 8)), drawn((2, 5, 64), seed=1)
    found = quantise(kernel, kind=kind, stacked=0, inputs=1)
    whole = dequantise(**found)
    value, pull = jax.vjp(lambda x: quantisation.product("BTD,DNH->BTNH", x, **found), x)
    expected, expected_pull = jax.vjp(lambda x: jnp.einsum("BTD,DNH->BTNH", x, whole), x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(value)[0], expected_pull(expected)[0], rtol=1e-5, atol=1e-7)


def test_a_tree_keeps_what_is_no_kernel_of_a_layer():
    params = {"embedding": drawn((8, 4)), "layers": {"o": {"kernel": drawn((2, 3, 64, 5))}, "norm": {"scale": 1.0}}}
    params["layers"]["q"] = {"kernel": drawn((2, 4, 6, 2)), "bias": drawn((2, 6, 2))}
    found = jax.jit(lambda params: quantisation.quantise_tree(params, "int8", {"o": 2, "q": 1}))(params)
    assert found["layers"]["o"]["scales"].shape == (2, 1, 1, 5) and found["layers"]["q"]["scales"].shape == (2, 1, 6, 2)
    back = jax.jit(quantisation.dequantise_tree)(found)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), back, params)
    np.testing.assert_array_equal(back["embedding"], params["embedding"])
