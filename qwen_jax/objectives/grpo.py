"""Group relative policy optimisation (arXiv:2402.03300) and its successors: no value model, answers judge each other.

What their names stand for, as arguments of `advantages` and of `loss`:

GRPO         scale="group"
Dr. GRPO     scale="none"; aggregation="constant", kl_coef=0                    (arXiv:2503.20783)
DAPO         scale="group"; aggregation="token", clip_high=0.28, kl_coef=0      (arXiv:2503.14476)
GSPO         scale="group"; per_sequence=True, clip_low=3e-4, clip_high=4e-4    (arXiv:2507.18071)
RLOO         baseline="others", scale="none"; aggregation="token"               (arXiv:2402.14740)
REINFORCE++  baseline="group", scale="batch"; aggregation="token"               (arXiv:2501.03262)

Shapes: N prompts, G answers to each, B = N * G answers, T places. Everything is computed in float32.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.objectives import divergence, masked, ppo

Aggregation = Literal["sequence", "token", "constant"]
Baseline = Literal["group", "others"]
Scale = Literal["group", "batch", "none"]


def advantages(
    rewards_NG: jax.Array, *, baseline: Baseline = "group", scale: Scale = "group", epsilon: float = 1e-4
) -> jax.Array:
    """Returns by how much each answer was better than the others to its prompt, [N, G] float32.

    Args:
      rewards_NG: [N, G].
      baseline: what is taken off: the mean of the group, or that of the group's other answers.
      scale: what is divided by: the standard deviation of the group, that of all advantages, or nothing. Deviations are
        those of a sample (divided by their number less 1).
      epsilon: added to the deviation; a group that agrees has advantages of 0.

    Raises:
      InputError: on an unknown baseline or scale, or groups of one.
    """
    for name, value, known in (("baseline", baseline, Baseline), ("scale", scale, Scale)):
        if value not in get_args(known):
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(get_args(known))}")
    G = rewards_NG.shape[1]
    if G < 2:
        raise InputError(f"rewards are {list(rewards_NG.shape)}; expected groups of at least 2 answers to a prompt")
    rewards_NG = jax.lax.stop_gradient(rewards_NG.astype(jnp.float32))
    lead_NG = rewards_NG - jnp.mean(rewards_NG, axis=1, keepdims=True)
    if baseline == "others":
        lead_NG *= G / (G - 1)
    if scale == "none":
        return lead_NG
    axis = 1 if scale == "group" else None
    return lead_NG / (jnp.std(lead_NG, axis=axis, ddof=1, keepdims=True) + epsilon)


def loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.04,
    estimator: divergence.Estimator = "k3",
    per_sequence: bool = False,
    aggregation: Aggregation = "sequence",
    constant: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of -min(w A, clip(w) A) + kl_coef * KL(policy, reference).

    Args:
      log_probs: [B, T] of the tokens under the policy that is trained.
      old_log_probs: [B, T] under the one that sampled them.
      ref_log_probs: [B, T] under the reference; None where kl_coef is 0.
      advantages: [B] of `advantages`, or [B, T].
      mask: [B, T], 0 where no token of the policy stands.
      clip_low, clip_high: how far a ratio may fall and rise before it earns no more.
      dual_clip: as in `ppo.policy_loss`.
      kl_coef: weight of the divergence; 0.04 in DeepSeekMath.
      estimator: of `divergence.per_token`.
      per_sequence: one ratio for an answer, the geometric mean of its tokens'.
      aggregation: "sequence": mean over the tokens of an answer, then over answers; "token": over all tokens;
        "constant": sums over tokens divided by `constant`, then the mean over answers: length neither dilutes nor pays.
      constant: T if None.

    Returns:
      The mean, scalar. Metrics: those of `ppo.policy_loss`, and "kl" where there is a reference.

    Raises:
      InputError: on an unknown aggregation, or a kl_coef without a reference.
    """
    if aggregation not in get_args(Aggregation):
        raise InputError(f"aggregation is {aggregation!r}; expected one of {', '.join(get_args(Aggregation))}")
    if kl_coef and ref_log_probs is None:
        raise InputError(f"kl_coef is {kl_coef} without ref_log_probs; expected both, or a kl_coef of 0")
    surrogate_BT, ratio_BT, held_BT = ppo.clipped(
        log_probs, old_log_probs, advantages, mask,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, per_sequence=per_sequence,
    )  # fmt: skip
    metrics = ppo.ratio_metrics(log_probs, old_log_probs, ratio_BT, held_BT, mask)
    loss_BT = -surrogate_BT
    if ref_log_probs is not None:
        seen_BT = mask != 0
        pair = (jnp.where(seen_BT, x, 0.0) for x in (log_probs, jax.lax.stop_gradient(ref_log_probs)))
        kl_BT = divergence.per_token(*pair, estimator=estimator)
        metrics["kl"] = masked.mean(kl_BT, mask)
        loss_BT += kl_coef * kl_BT
    return aggregate(loss_BT, mask, aggregation, constant), metrics


def aggregate(x_BT: jax.Array, mask: jax.Array, how: Aggregation, constant: int | None = None) -> jax.Array:
    """Returns the mean of per-token figures as `loss` says; answers without a token do not count."""
    if how == "token":
        return masked.mean(x_BT, mask)
    sums_B, counts_B = masked.total(x_BT, mask, axis=1), jnp.sum(mask != 0, axis=1)
    divisor_B = jnp.maximum(counts_B, 1) if how == "sequence" else constant or x_BT.shape[1]
    return masked.mean(sums_B / divisor_B, counts_B > 0)
