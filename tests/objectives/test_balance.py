"""The balancing losses against loops over tokens, where they are known in closed form, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.objectives import balance
from qwen_jax.ops.routing import route

L, B, T, E, K = 3, 4, 6, 5, 2


def routed(logits_LBTE, valid_BT=None, k=K):
    valid_BT = jnp.ones(logits_LBTE.shape[1:3], bool) if valid_BT is None else valid_BT
    return jax.vmap(lambda logits: route(logits, valid_BT, experts_per_token=k, normalize=True)[2])(logits_LBTE)


def logits(seed=0, shape=(L, B, T, E)):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, shape), jnp.float32)


VALID = np.random.default_rng(1).random((B, T)) < 0.7


def by_hand(logits_BTE, valid_BT, f_from=None):
    """E * sum f * P over some tokens, token by token; f of other tokens if they are given."""

    def shares(logits_BTE, valid_BT):
        f, p, n = np.zeros(E), np.zeros(E), 0
        for row, marks in zip(np.asarray(logits_BTE, np.float64), valid_BT, strict=True):
            for token, valid in zip(row, marks, strict=True):
                if valid:
                    prob = np.exp(token) / np.exp(token).sum()
                    f[np.argsort(-prob)[:K]] += 1
                    p, n = p + prob, n + 1
        return f / n, p / n

    return E * np.sum(shares(*(f_from or (logits_BTE, valid_BT)))[0] * shares(logits_BTE, valid_BT)[1])


def test_pooled_takes_all_layers_for_one():
    x = logits()
    found = balance.pooled(*routed(x, VALID)[:2], routed(x, VALID).tokens)
    flat = np.asarray(x).reshape(L * B, T, E)
    np.testing.assert_allclose(found, by_hand(flat, np.tile(VALID, (L, 1))), rtol=1e-5)


def test_per_layer_is_the_mean_over_layers():
    x = logits()
    r = routed(x, VALID)
    expected = np.mean([by_hand(layer, VALID) for layer in x])
    np.testing.assert_allclose(balance.per_layer(r.counts, r.probs, r.tokens), expected, rtol=1e-5)
    one_layer = balance.pooled(r.counts[:1], r.probs[:1], r.tokens[:1])
    np.testing.assert_allclose(one_layer, by_hand(x[0], VALID), rtol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_balanced_each_by_itself(groups):
    x = logits()
    r, size, expected, tokens = routed(x, VALID), B // groups, 0.0, 0
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        weight = VALID[rows].sum()
        expected += weight * np.mean([by_hand(layer[rows], VALID[rows]) for layer in x])
        tokens += weight
    found = balance.per_layer(r.counts, r.probs, r.tokens, groups=groups)
    np.testing.assert_allclose(found, expected / tokens, rtol=1e-5)


def test_global_batch_has_the_shares_of_this_microbatch_and_those_before():
    first, second = logits(0), logits(1)
    other = np.random.default_rng(2).random((B, T)) < 0.6
    a, b = routed(first, VALID), routed(second, other)
    alone, so_far = balance.global_batch(a.counts, a.probs, a.tokens)
    np.testing.assert_allclose(alone, balance.per_layer(a.counts, a.probs, a.tokens), rtol=1e-6)
    found, own = balance.global_batch(b.counts, b.probs, b.tokens, before=so_far)
    both = np.concatenate([VALID, other])
    expected = np.mean([
        by_hand(second[i], other, f_from=(np.concatenate([first[i], second[i]]), both)) for i in range(L)
    ])  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(own[1], [other.sum()] * L)


def test_an_even_load_costs_k_and_one_expert_for_all_costs_e():
    even = jnp.zeros((1, B, E, E)).at[0, :, jnp.arange(E), jnp.arange(E)].set(1e-3)  # each token prefers another
    r = routed(even, k=1)
    lone = routed(jnp.zeros((1, B, T, E)).at[..., 2].set(50.0), k=1)
    for loss in (balance.pooled, balance.per_layer, lambda *x: balance.global_batch(*x)[0]):
        np.testing.assert_allclose(loss(r.counts, r.probs, r.tokens), 1, rtol=1e-5)
        np.testing.assert_allclose(loss(lone.counts, lone.probs, lone.tokens), E, rtol=1e-5)
    assert balance.overload(r.counts) == 1 and balance.overload(lone.counts) == E


def test_opposite_overloads_of_two_layers_cancel_in_the_pooled_loss_only():
    two = jnp.zeros((2, 1, T, 2)).at[0, ..., 0].set(50.0).at[1, ..., 1].set(50.0)
    r = routed(two, k=1)
    np.testing.assert_allclose(balance.pooled(r.counts, r.probs, r.tokens), 1, rtol=1e-5)
    np.testing.assert_allclose(balance.per_layer(r.counts, r.probs, r.tokens), 2, rtol=1e-5)


def test_the_gradient_is_that_of_the_probabilities_with_constant_shares():
    """d/dlogit of E f.P: E/n p_e (f_e - f.p) for each token."""
    x = logits(3, (1, B, T, E))

    def loss(x):
        r = routed(x)
        return balance.global_batch(r.counts, r.probs, r.tokens)[0]

    p = np.asarray(jax.nn.softmax(x, axis=-1), np.float64)
    f = np.asarray(routed(x).counts, np.float64).sum(1)[0] / (B * T)
    expected = E / (B * T) * p * (f - (p @ f)[..., None])
    np.testing.assert_allclose(jax.grad(loss)(x), expected, atol=1e-6)


def test_router_z_is_the_mean_square_of_the_logsumexp():
    x = logits()
    r = routed(x, VALID)
    square = np.log(np.exp(np.asarray(x, np.float64)).sum(-1)) ** 2
    np.testing.assert_allclose(balance.router_z(r.z, r.tokens), square[:, VALID].mean(), rtol=1e-5)


def test_a_batch_of_padding_costs_nothing():
    r = routed(logits(), np.zeros((B, T), bool))
    assert balance.pooled(r.counts, r.probs, r.tokens) == balance.router_z(r.z, r.tokens) == 0
    assert balance.per_layer(r.counts, r.probs, r.tokens) == balance.global_batch(r.counts, r.probs, r.tokens)[0] == 0
