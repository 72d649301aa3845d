"""The ranking loss against closed forms and plain loops; and which answers of a list are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.objectives import reward


def test_it_is_minus_the_log_of_the_bradley_terry_probability():
    chosen, rejected = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    odds = np.exp(chosen) / (np.exp(chosen) + np.exp(rejected))
    loss, metrics = reward.loss(jnp.asarray(chosen), jnp.asarray(rejected))
    np.testing.assert_allclose(loss, -np.log(odds).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], (chosen - rejected).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["score"], (chosen + rejected).mean() / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 1 / 3, rtol=1e-6)  # equal scores are no success


def test_equal_scores_cost_log_2_and_pull_the_two_apart():
    same = jnp.zeros(4)
    np.testing.assert_allclose(reward.loss(same, same)[0], np.log(2), rtol=1e-6)
    up, down = jax.grad(lambda a, b: reward.loss(a, b)[0], argnums=(0, 1))(same, same)
    np.testing.assert_allclose(up, -0.5 / 4)
    np.testing.assert_allclose(down, 0.5 / 4)


def test_a_margin_asks_for_a_lead_and_centring_for_a_level():
    chosen, rejected, margin = jnp.array([2.0, 1.0]), jnp.array([1.0, -1.0]), jnp.array([1.0, 0.5])
    expected = np.log1p(np.exp(-(np.array([1.0, 2.0]) - np.array([1.0, 0.5])))).mean()
    np.testing.assert_allclose(reward.loss(chosen, rejected, margin=margin)[0], expected, rtol=1e-6)
    plain, centred = reward.loss(chosen, rejected)[0], reward.loss(chosen, rejected, centring=0.1)
    np.testing.assert_allclose(centred[0], plain + 0.1 * (9 + 0) / 2, rtol=1e-6)
    assert centred[1]["nll"] == plain


def test_what_weighs_nothing_may_be_anything_and_has_no_gradient():
    chosen, rejected, weights = jnp.array([1.0, jnp.inf]), jnp.array([0.5, jnp.inf]), jnp.array([1.0, 0.0])
    loss = lambda a, b: reward.loss(a, b, centring=0.1, weights=weights)[0]
    np.testing.assert_allclose(
        loss(chosen, rejected), reward.loss(chosen[:1], rejected[:1], centring=0.1)[0], rtol=1e-6
    )
    assert jax.grad(loss)(chosen.at[1].set(3.0), rejected.at[1].set(2.0))[1] == 0
    assert reward.loss(chosen, rejected, weights=jnp.zeros(2))[0] == 0


@pytest.mark.parametrize("size", [1e3, 1e30, 3e38])
def test_extreme_scores_are_not_nan(size):
    chosen, rejected = jnp.array([size, -size]), jnp.array([-size, size])
    value, grads = jax.value_and_grad(lambda a: reward.loss(a, rejected)[0])(chosen)
    assert not np.isnan(value) and value > 0.9 * size and not np.isnan(grads).any()
    assert grads[0] == 0 and grads[1] == -0.5


def test_bfloat16_scores_are_compared_in_float32():
    chosen, rejected = jnp.array([100.0, 3.0], jnp.bfloat16), jnp.array([99.0, 2.0], jnp.bfloat16)
    loss, metrics = reward.loss(chosen, rejected)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1.0)), rtol=1e-6)


def lists(seed=0):
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 4, (3, 7)).astype(np.float32)  # some equal
    groups = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 3, 3, 0], [1] * 7], np.int32)
    return values, groups


@pytest.mark.parametrize("per_group, least", [(False, 0.0), (True, 0.0), (True, 2.0)])
def test_all_pairs_of_each_list_are_compared_and_no_others(per_group, least):
    values, groups = lists()
    expected = np.zeros((3, 7, 7))
    for b in range(3):
        for group in range(1, 4):
            mine, apart = np.flatnonzero(groups[b] == group), max(least, 1)
            found = [(i, j) for i in mine for j in mine if values[b, i] - values[b, j] >= apart]
            for i, j in found:
                expected[b, i, j] = 1 / len(found) if per_group else 1
    found = reward.pairs(jnp.asarray(values), jnp.asarray(groups), per_group=per_group, least=least)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_list_of_k_has_k_k_minus_1_halves_pairs():
    weights = reward.pairs(jnp.arange(9.0)[None], jnp.ones((1, 9), jnp.int32))
    assert weights.sum() == 9 * 8 / 2


def test_the_loss_over_lists_is_the_mean_over_their_pairs():
    values, groups = lists()
    scores = np.random.default_rng(1).normal(size=values.shape).astype(np.float32)
    terms = [np.log1p(np.exp(scores[b, j] - scores[b, i]))
             for b in range(3) for i in range(7) for j in range(7)
             if groups[b, i] == groups[b, j] > 0 and values[b, i] > values[b, j]]  # fmt: skip
    weights = reward.pairs(jnp.asarray(values), jnp.asarray(groups)).reshape(-1)
    loss = reward.loss(*reward.both(jnp.asarray(scores)), weights=weights)[0]
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-6)
