"""PPO against loops over tokens, closed forms, and what must not matter: masked places, how far rows are padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.objectives import divergence, masked, ppo

SHAPE = (4, 7)
# A prompt in front, one that fills its row, a tool's answer in the middle, and an answer of no token.
MASK = np.array([[0, 0, 1, 1, 1, 0, 0], [1] * 7, [0, 1, 1, 0, 0, 1, 0], [0] * 7])


def drawn(seed, *, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, SHAPE).astype(np.float32)


def naive_advantages(rewards, values, mask, gamma, lam, bootstrap):
    advantages = np.zeros(SHAPE)
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        for i, t in enumerate(places):  # the definition: a discounted sum of all later deltas
            for distance, s in enumerate(places[i:]):
                following = values[b, places[i + distance + 1]] if i + distance + 1 < len(places) else bootstrap[b]
                delta = rewards[b, s] + gamma * following - values[b, s]
                advantages[b, t] += (gamma * lam) ** distance * delta
    return advantages


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.7, 0.95, 1.0]), st.booleans())
def test_advantages_are_sums_of_later_surprises(gamma, lam, cut_off):
    rewards, values, ending = drawn(0), drawn(1), drawn(2)[:, 0] if cut_off else np.zeros(4, np.float32)
    expected = naive_advantages(rewards, values, MASK, gamma, lam, ending)
    dirty = np.where(MASK, values, np.nan)
    found, returns = ppo.advantages(
        rewards, jnp.asarray(dirty), MASK, gamma=gamma, lam=lam, bootstrap=jnp.asarray(ending) if cut_off else None
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(MASK, expected + values, 0), atol=1e-5)


def test_with_lambda_1_the_returns_are_the_rewards_to_come():
    rewards, values = drawn(0), drawn(1)
    _, returns = ppo.advantages(rewards, values, np.ones(SHAPE), lam=1.0)
    np.testing.assert_allclose(returns, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], atol=1e-5)


def test_the_score_is_paid_at_the_last_token_and_the_divergence_at_each():
    scores, kl = np.array([1.0, 2.0, 3.0, 4.0]), drawn(0)
    found = np.asarray(ppo.token_rewards(scores, jnp.where(MASK, kl, jnp.nan), MASK, kl_coef=0.5))
    expected = np.where(MASK, -0.5 * kl, 0)
    for row, last, score in ((0, 4, 1), (1, 6, 2), (2, 5, 3)):
        expected[row, last] += score
    np.testing.assert_allclose(found, expected, atol=1e-6)


def naive_policy_loss(log_probs, old, advantages, mask, low, high, dual):
    terms = []
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio, advantage = np.exp(log_probs[b, t] - old[b, t]), advantages[b, t]
        term = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        if dual is not None and advantage < 0:
            term = max(term, dual * advantage)
        terms.append(-term)
    return np.mean(terms)


@pytest.mark.parametrize("high, dual", [(None, None), (0.4, None), (None, 1.5)])
def test_the_policy_loss_is_the_clipped_surrogate_token_by_token(high, dual):
    old, new, advantages = drawn(0), drawn(1), drawn(2)
    loss, metrics = ppo.policy_loss(new, old, advantages, MASK, clip=0.2, clip_high=high, dual_clip=dual)
    expected = naive_policy_loss(new, old, advantages, MASK, 0.2, 0.2 if high is None else high, dual)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # What the clip holds has no gradient, and nothing else has none.
    gradient = jax.grad(lambda new: ppo.policy_loss(new, old, advantages, MASK, clip_high=high, dual_clip=dual)[0])(new)
    still = (np.asarray(gradient) == 0) & (MASK == 1)
    np.testing.assert_allclose(metrics["clip_fraction"], still.sum() / MASK.sum(), rtol=1e-6)
    ratios = np.exp(new - old)[MASK == 1]
    np.testing.assert_allclose([metrics["ratio_max"], metrics["ratio_min"]], [ratios.max(), ratios.min()], rtol=1e-5)


def test_at_the_policy_that_sampled_the_gradient_is_that_of_reinforce():
    log_probs, advantages = drawn(0), drawn(1)
    loss = lambda x: ppo.policy_loss(x, log_probs, advantages, MASK)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(log_probs)
    np.testing.assert_allclose(value, -masked.mean(advantages, MASK), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(MASK, -advantages, 0) / MASK.sum(), atol=1e-7)
    assert metrics["clip_fraction"] == 0 and metrics["kl_old"] == 0 and metrics["ratio_max"] == 1


def test_entropy_is_rewarded():
    old, new, entropy = drawn(0), drawn(1), np.abs(drawn(2))
    plain = ppo.policy_loss(new, old, drawn(3), MASK)[0]
    loss, metrics = ppo.policy_loss(new, old, drawn(3), MASK, entropy=entropy, entropy_coef=0.1)
    np.testing.assert_allclose(plain - loss, 0.1 * entropy[MASK == 1].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy[MASK == 1].mean(), rtol=1e-5)


def test_the_value_loss_takes_the_worse_of_both_and_explains_what_it_explains():
    values, old, returns = drawn(0), drawn(1), drawn(2)
    held = old + np.clip(values - old, -0.15, 0.15)
    terms = np.maximum((values - returns) ** 2, (held - returns) ** 2)[MASK == 1] / 2
    loss, metrics = ppo.value_loss(values, old, returns, MASK)
    np.testing.assert_allclose(loss, terms.mean(), rtol=1e-5)
    errors = (returns - values)[MASK == 1]
    np.testing.assert_allclose(metrics["explained_variance"], 1 - errors.var() / returns[MASK == 1].var(), rtol=1e-4)
    assert ppo.value_loss(returns, returns, returns, MASK)[1]["explained_variance"] == 1


@pytest.mark.parametrize("what", ["policy", "value"])
def test_what_is_masked_reaches_neither_the_loss_nor_the_gradient(what):
    def loss(x):
        if what == "policy":
            return ppo.policy_loss(x, drawn(1), drawn(2), MASK)[0]
        return ppo.value_loss(x, drawn(1), drawn(2), MASK)[0]

    clean, dirty = drawn(0), np.where(MASK, drawn(0), np.inf)
    for found, expected in zip(jax.value_and_grad(loss)(dirty), jax.value_and_grad(loss)(clean), strict=True):
        np.testing.assert_array_equal(found, expected)
    nothing = jax.value_and_grad(lambda x: ppo.policy_loss(x, x, x, np.zeros(SHAPE))[0])(clean)
    assert nothing[0] == 0 and not np.any(nothing[1])


def test_bfloat16_is_computed_in_float32():
    old, new, advantages = (jnp.asarray(drawn(seed), jnp.bfloat16) for seed in range(3))
    found = ppo.policy_loss(new, old, advantages, MASK)[0]
    assert found.dtype == jnp.float32
    same = ppo.policy_loss(*(x.astype(jnp.float32) for x in (new, old, advantages)), MASK)[0]
    assert found == same


def test_a_dual_clip_that_clips_everything_is_refused():
    with pytest.raises(InputError, match="dual_clip is 0.5; expected over 1"):
        ppo.policy_loss(*[drawn(0)] * 3, MASK, dual_clip=0.5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_have_the_mean_that_is_the_divergence(estimator):
    """Over all tokens of two small vocabularies, weighted by the policy: no sampling, so to the last digit."""
    policy, other = (jax.nn.log_softmax(jnp.asarray(drawn(seed))) for seed in (0, 1))
    exact = jnp.sum(jnp.exp(policy) * (policy - other), axis=1)
    found = jnp.sum(jnp.exp(policy) * divergence.per_token(policy, other, estimator=estimator), axis=1)
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_k2_has_the_gradient_of_the_divergence():
    logits, other = jnp.asarray(drawn(0)), jax.nn.log_softmax(jnp.asarray(drawn(1)))

    def exact(logits):
        policy = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(policy) * (policy - other))

    def sampled(logits):
        policy = jax.nn.log_softmax(logits)
        weights = jax.lax.stop_gradient(jnp.exp(policy))
        return jnp.sum(weights * divergence.per_token(policy, other, estimator="k2"))

    np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(exact)(logits), atol=1e-5)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(InputError, match="'k4' is unknown; expected one of k1, k2, k3"):
        divergence.per_token(jnp.zeros(1), jnp.zeros(1), estimator="k4")


def test_whitening_leaves_mean_0_and_variance_1_of_what_counts():
    x = np.where(MASK, 3 + 2 * drawn(0), np.nan)
    found = np.asarray(masked.whiten(x, MASK))
    kept = found[MASK == 1]
    np.testing.assert_allclose([kept.mean(), kept.var()], [0, 1], atol=1e-5)
    assert not found[MASK == 0].any()
    scaled = np.asarray(masked.whiten(x, MASK, shift=False))[MASK == 1]
    np.testing.assert_allclose(scaled - kept, np.nanmean(x), rtol=1e-4)
