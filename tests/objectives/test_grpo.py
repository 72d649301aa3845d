"""GRPO and its successors against loops over answers; what each name stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.objectives import grpo, ppo
from tests.objectives.test_ppo import MASK, drawn

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [-1.0, 2.0, 0.0, 4.0]])
ADVANTAGES = np.array([0.7, -1.2, 0.4, -0.3], np.float32)


def test_advantages_of_a_group():
    expected = np.stack([(row - row.mean()) / (row.std(ddof=1) + 1e-4) for row in REWARDS])
    np.testing.assert_allclose(grpo.advantages(REWARDS), expected, atol=1e-6)
    np.testing.assert_allclose(grpo.advantages(REWARDS, scale="none"), REWARDS - REWARDS.mean(1, keepdims=True))
    lead = REWARDS - REWARDS.mean(1, keepdims=True)
    np.testing.assert_allclose(grpo.advantages(REWARDS, scale="batch"), lead / (lead.std(ddof=1) + 1e-4), rtol=1e-5)


def test_leave_one_out_takes_off_the_mean_of_the_others():
    expected = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in REWARDS]
    np.testing.assert_allclose(grpo.advantages(REWARDS, baseline="others", scale="none"), expected, atol=1e-6)


def naive(log_probs, old, ref, advantages, mask, *, low, high, kl_coef, per_sequence, aggregation, constant=None):
    answers = []
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        if not len(places):
            continue
        ratios = np.exp(log_probs[b, places] - old[b, places])
        if per_sequence:
            ratios[:] = np.prod(ratios) ** (1 / len(places))
        terms = []
        for ratio, t in zip(ratios, places, strict=True):
            gain = min(ratio * advantages[b], min(max(ratio, 1 - low), 1 + high) * advantages[b])
            delta = ref[b, t] - log_probs[b, t]
            terms.append(-gain + kl_coef * (np.exp(delta) - delta - 1))
        answers.append(terms)
    if aggregation == "token":
        return np.mean(np.concatenate(answers))
    if aggregation == "sequence":
        return np.mean([np.mean(terms) for terms in answers])
    return np.mean([np.sum(terms) / constant for terms in answers])


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_the_loss_answer_by_answer(aggregation, per_sequence):
    new, old, ref = drawn(0), drawn(1), drawn(2)
    how = dict(kl_coef=0.3, per_sequence=per_sequence, aggregation=aggregation, constant=12)
    loss, metrics = grpo.loss(new, old, ref, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.3, **how)
    expected = naive(new, old, ref, ADVANTAGES, MASK, low=0.2, high=0.3, **how)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    delta = (ref - new)[MASK == 1]
    np.testing.assert_allclose(metrics["kl"], np.mean(np.exp(delta) - delta - 1), rtol=1e-5)


def test_one_ratio_for_an_answer_is_clipped_as_a_whole():
    """GSPO: tokens far from the old policy that cancel out are not held back, and move alike."""
    mask, old = np.ones((1, 2)), np.zeros((1, 2), np.float32)
    new = jnp.array([[2.0, -2.0]])
    loss = lambda new: grpo.loss(
        new, old, None, jnp.ones(1), mask, clip_low=3e-4, clip_high=4e-4, kl_coef=0, per_sequence=True
    )
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(new)
    np.testing.assert_allclose([value, metrics["ratio_max"], metrics["clip_fraction"]], [-1, 1, 0])
    np.testing.assert_allclose(gradient, [[-0.5, -0.5]])
    assert not np.any(jax.grad(lambda new: loss(new)[0])(new + 0.01))  # now the answer's ratio is 1.01


def test_without_divergence_over_tokens_it_is_ppo():
    new, old = drawn(0), drawn(1)
    found = grpo.loss(new, old, None, ADVANTAGES, MASK, kl_coef=0.0, aggregation="token")[0]
    np.testing.assert_allclose(found, ppo.policy_loss(new, old, ADVANTAGES, MASK)[0], rtol=1e-6)


def test_what_is_masked_reaches_neither_the_loss_nor_the_gradient():
    ref = np.where(MASK, drawn(2), np.inf)
    for per_sequence in (False, True):
        how = dict(per_sequence=per_sequence)
        loss = lambda x, ref, how=how: grpo.loss(x, drawn(1), ref, ADVANTAGES, MASK, **how)[0]
        clean = jax.value_and_grad(loss)(drawn(0), drawn(2))
        dirty = jax.value_and_grad(loss)(np.where(MASK, drawn(0), -np.inf), ref)
        for found, expected in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("call, message", [
    (lambda: grpo.loss(*[jnp.zeros((1, 1))] * 5, aggregation="mean"), "aggregation is 'mean'; expected one of"),
    (lambda: grpo.loss(*[jnp.zeros((1, 1))] * 2, None, *[jnp.zeros((1, 1))] * 2), "kl_coef is 0.04 without ref_log"),
    (lambda: grpo.advantages(jnp.zeros((3, 1))), r"rewards are \[3, 1\]; expected groups of at least 2"),
    (lambda: grpo.advantages(jnp.zeros((3, 2)), scale="std"), "scale is 'std'; expected one of group, batch, none"),
])  # fmt: skip
def test_bad_input_is_refused_before_it_is_computed_with(call, message):
    with pytest.raises(InputError, match=message):
        call()
