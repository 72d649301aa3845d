"""Experts against a loop over tokens: values, gradients, uneven loads, and that nothing is computed for all experts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops import tiles
from qwen_jax.ops.experts import Weights, experts, order_by_expert

D, F = 8, 12


def case(R, E, K, seed=0, choose=None):
    """Tokens, gates, choices and weights; `choose`: draw -> choices [R, K], different experts each if None."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(0, 0.5, shape), jnp.float32)
    choice = np.stack([draw.permutation(E)[:K] for _ in range(R)]) if choose is None else choose(draw)
    weights = Weights(normal(E, D, F), normal(E, D, F), normal(E, F, D))
    return normal(R, D), jnp.asarray(draw.random((R, K)), jnp.float32), jnp.asarray(choice, jnp.int32), weights


def by_hand(x, gates, choice, weights):
    """Token by token, choice by choice, in float64."""
    out = np.zeros(x.shape)
    gate, up, down = (np.asarray(w, np.float64) for w in weights)
    for r, row in enumerate(np.asarray(x, np.float64)):
        for g, e in zip(np.asarray(gates[r], np.float64), np.asarray(choice[r]), strict=True):
            if e < len(gate):
                a = row @ gate[e]
                out[r] += g * ((a / (1 + np.exp(-a)) * (row @ up[e])) @ down[e])
    return out


def for_all(x, gates, choice, weights):
    """The same with every expert computed for every token: its gradient is the oracle of ours."""
    ids = jnp.arange(weights.gate.shape[0])[None, None]
    share_RE = jnp.sum(jnp.where(choice[:, :, None] == ids, gates[:, :, None], 0.0), axis=1)
    h = jax.nn.silu(jnp.einsum("RD,EDF->REF", x, weights.gate)) * jnp.einsum("RD,EDF->REF", x, weights.up)
    return jnp.einsum("RE,REF,EFD->RD", share_RE, h, weights.down)


CASES = {
    "uneven": dict(R=60, E=5, K=2),
    "one choice": dict(R=7, E=3, K=1),
    "all experts": dict(R=9, E=4, K=4),
    "all to one, tiles of every size": dict(R=1000, E=3, K=1, choose=lambda draw: np.full((1000, 1), 1)),
    "some to nobody": dict(R=30, E=4, K=2, choose=lambda draw: draw.integers(0, 5, (30, 2))),
    "all to nobody": dict(R=5, E=4, K=2, choose=lambda draw: np.full((5, 2), 4)),
}


def gradients_of(function):
    """Returns (x, gates, choice, weights) -> the gradients, compiled once for all choices of a shape."""
    run = lambda x, gates, weights, choice, d_out: jnp.sum(function(x, gates, choice, weights) * d_out)
    compiled = jax.jit(jax.grad(run, (0, 1, 2)))

    def gradients(x, gates, choice, weights):
        d_out = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
        return compiled(x, gates, weights, choice, d_out)

    return gradients


@pytest.fixture(params=["tiles", "gmm_tpu"])
def back_end(request, monkeypatch):
    if request.param == "gmm_tpu":
        interpreted = lambda *arrays, tpu, default: functools.partial(tpu, interpret=True)(*arrays)
        monkeypatch.setattr(jax.lax, "platform_dependent", interpreted)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_loop_and_gradients_those_of_the_dense_product(name, back_end):
    arguments = case(**CASES[name])
    np.testing.assert_allclose(jax.jit(experts)(*arguments), by_hand(*arguments), atol=1e-5)
    found, expected = gradients_of(experts)(*arguments), gradients_of(for_all)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), found, expected)


def test_bfloat16_stays_bfloat16_and_close():
    x, gates, choice, weights = case(40, 4, 2)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    found = experts(cast(x), gates, choice, cast(weights))
    assert found.dtype == jnp.bfloat16
    expected = by_hand(cast(x).astype(jnp.float32), gates, choice, jax.tree.map(jnp.float32, cast(weights)))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


@hypothesis.given(st.sampled_from([(1, 1, 1), (6, 3, 2), (40, 9, 4)]), st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_pair_has_one_place_among_its_experts(shape, data):
    R, E, K = shape
    choice = np.array(data.draw(st.lists(st.integers(0, E), min_size=R * K, max_size=R * K)), np.int32).reshape(R, K)
    order = jax.tree.map(np.asarray, jax.jit(order_by_expert, static_argnums=1)(jnp.asarray(choice), E))
    M, seen = len(order.token_M), set()
    assert not (order.groups.starts % tiles.ALIGNMENT).any() and not (order.groups.sizes % tiles.ALIGNMENT).any()
    for r, k in np.ndindex(R, K):
        place, expert = order.place_RK[r, k], choice[r, k]
        if expert == E:
            assert place == M
            continue
        start, size = order.groups.starts[expert], order.groups.sizes[expert]
        assert start <= place < start + size <= M and place not in seen
        assert order.token_M[place] == r and order.pair_M[place] == r * K + k
        seen.add(place)
    empty = [place for place in range(M) if place not in seen]
    assert (order.pair_M[empty] == R * K).all() and (order.token_M[empty] == R).all()
    assert order.groups.sizes.sum() - len(seen) <= E * (tiles.ALIGNMENT - 1)


def test_tiles_cover_each_experts_places_once():
    groups, M = tiles.Groups(jnp.array([0, 48, 48, 1184]), jnp.array([48, 0, 1136, 16])), 1216

    def mark(expert, start, C, state):
        owner = jax.lax.dynamic_update_slice_in_dim(state[0], jnp.full(C, expert, jnp.int32), start, 0)
        count = jax.lax.dynamic_slice_in_dim(state[1], start, C) + 1
        return owner, jax.lax.dynamic_update_slice_in_dim(state[1], count, start, 0)

    owner, count = tiles.each_tile(groups, M, mark, (jnp.full(M, -1), jnp.zeros(M, jnp.int32)))
    np.testing.assert_array_equal(owner, [0] * 48 + [2] * 1136 + [3] * 16 + [-1] * 16)
    np.testing.assert_array_equal(count, [1] * 1200 + [0] * 16)


def arrays_in(jaxpr):
    """Sizes of all arrays that a program makes, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


def test_no_array_has_tokens_and_experts_and_a_width():
    R, E, K = 256, 32, 2
    arguments = case(R, E, K)
    jaxpr = jax.make_jaxpr(gradients_of(experts))(*arguments).jaxpr
    largest = max(array.size for array in arrays_in(jaxpr))
    places = R * K + E * (tiles.ALIGNMENT - 1)
    assert largest <= max(1.5 * places * F, E * D * F) < R * E * D
