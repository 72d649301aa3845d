"""Learning a score from comparisons: the pairwise ranking loss of reward models (Qwen report, section 3.2.1).

Shapes: B pairs; in `pairs` B rows of A answers each.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.objectives import masked


def loss(
    chosen_scores: jax.Array,
    rejected_scores: jax.Array,
    *,
    margin: jax.Array | None = None,
    centring: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over pairs of -log sigmoid(chosen - rejected - margin), the Bradley-Terry likelihood.

    Only differences of scores are learned from, so their level is free; centring * (chosen + rejected)^2 holds it near
    0 (arXiv:2312.09244). The margin is that of Llama 2 (arXiv:2307.09288, equation 2).

    Args:
      chosen_scores, rejected_scores: [B] scores of the two answers; computed with in float32.
      margin: [B] by how much the chosen score has to lead; nothing if None.
      centring: weight of the regulariser.
      weights: [B] of each pair in all means, 0 for what is no pair; all 1 if None.

    Returns:
      The mean, scalar float32; 0 where there is no pair. Metrics, means of the same kind: "nll" (without the
      regulariser, nats), "accuracy" (share with chosen > rejected), "margin" (chosen - rejected), "score" (of both).
    """
    chosen_B, rejected_B = (x.astype(jnp.float32) for x in (chosen_scores, rejected_scores))
    lead_B = chosen_B - rejected_B
    nll_B = -jax.nn.log_sigmoid(lead_B if margin is None else lead_B - margin.astype(jnp.float32))
    mean = functools.partial(masked.mean, weights=weights)
    metrics = {
        "nll": mean(nll_B),
        "accuracy": mean(lead_B > 0),
        "margin": mean(lead_B),
        "score": mean((chosen_B + rejected_B) / 2),
    }
    if not centring:
        return metrics["nll"], metrics
    return metrics["nll"] + centring * mean(jnp.square(chosen_B + rejected_B)), metrics


def pairs(values_BA: jax.Array, groups_BA: jax.Array, *, least: float = 0.0, per_group: bool = False) -> jax.Array:
    """Returns which answers of a row are compared: all K (K - 1) / 2 pairs of each list of K.

    Args:
      values_BA: [B, A] float32, what people think of each answer: the higher is preferred, equal ones are no pair.
      groups_BA: [B, A] int32, which prompt of the row it answers, from 1; 0 is no answer.
      least: values that differ by less are no preference.
      per_group: a prompt's pairs weigh 1 together, as in InstructGPT (arXiv:2203.02155, equation 1); else 1 each.

    Returns:
      [B, A, A] float32: the weight of the pair in which the first is preferred to the second, 0 where it is no pair.
    """
    same_BAA = (groups_BA[:, :, None] == groups_BA[:, None, :]) & (groups_BA[:, :, None] > 0)
    lead_BAA = values_BA[:, :, None] - values_BA[:, None, :]
    weights_BAA = (same_BAA & (lead_BAA > 0) & (lead_BAA >= least)).astype(jnp.float32)
    if not per_group:
        return weights_BAA
    of_answer_BA = jnp.sum(weights_BAA, axis=2)
    of_group_BA = jnp.einsum("BAK,BK->BA", same_BAA.astype(jnp.float32), of_answer_BA)
    return weights_BAA / jnp.maximum(of_group_BA, 1.0)[:, :, None]


def both(x_BA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x of the first and of the second answer of each pair of `pairs`, [B * A * A] each, in its order."""
    B, A = x_BA.shape
    shape = (B, A, A)
    first_BAA = jnp.broadcast_to(x_BA[:, :, None], shape)
    second_BAA = jnp.broadcast_to(x_BA[:, None, :], shape)
    return first_BAA.reshape(-1), second_BAA.reshape(-1)
