"""Proximal policy optimisation (arXiv:1707.06347) on sampled answers, as in the Qwen report, section 3.2.2.

Shapes: B answers, T places; place t holds figures of the token sampled there. A mask is 0 where no token of the policy
stands: in prompts, in padding, and in what a tool has answered. Everything is computed in float32.
"""

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.objectives import divergence, masked


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, kl_coef: float | jax.Array) -> jax.Array:
    """Returns the reward of each token: - kl_coef * kl, and the answer's score at its last token.

    Args:
      scores: [B] of whole answers.
      kl: [B, T] of `divergence.per_token` between the policy that sampled and the reference.
      mask: [B, T]; an answer without tokens gets no reward.
      kl_coef: the weight of the divergence; 0.04 in the Qwen report.
    """
    seen_BT = mask != 0
    later_BT = jnp.flip(jnp.cumsum(jnp.flip(seen_BT, axis=1), axis=1), axis=1)
    at_end_BT = jnp.where(seen_BT & (later_BT == 1), scores.astype(jnp.float32)[:, None], 0.0)
    return at_end_BT - jnp.where(seen_BT, kl_coef * kl.astype(jnp.float32), 0.0)


def advantages(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns generalised advantages and returns (arXiv:1506.02438, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t

    t + 1 is the next unmasked place: a masked one is stepped over, not counted as a step.

    Args:
      rewards, values: [B, T]; a value is that of the answer before its token is chosen.
      mask: [B, T].
      gamma: discount.
      lam: weight of longer estimates; 1 is the plain return less the value.
      bootstrap: [B] value after the last unmasked token, of answers that were cut off; 0 if None: they have ended.

    Returns:
      Advantages and returns, [B, T] float32, 0 where masked. They are targets: no gradient flows through them.
    """
    rewards, values = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (rewards, values))
    ending_B = jnp.zeros(rewards.shape[0]) if bootstrap is None else jax.lax.stop_gradient(bootstrap)

    def step(later, now):
        (next_value_B, next_advantage_B), (reward_B, value_B, seen_B) = later, now
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        kept = jnp.where(seen_B, value_B, next_value_B), jnp.where(seen_B, advantage_B, next_advantage_B)
        return kept, jnp.where(seen_B, advantage_B, 0.0)

    by_place = tuple(x.T for x in (rewards, values, mask != 0))
    start = ending_B.astype(jnp.float32), jnp.zeros_like(rewards[:, 0])
    advantages_BT = jax.lax.scan(step, start, by_place, reverse=True)[1].T
    return advantages_BT, jnp.where(mask != 0, advantages_BT + values, 0.0)


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    entropy: jax.Array | None = None,
    entropy_coef: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over unmasked tokens of -min(w A, clip(w, 1 - clip, 1 + clip) A), w = policy / old policy.

    Args:
      log_probs: [B, T] of the tokens under the policy that is trained.
      old_log_probs: [B, T] under the one that sampled them.
      advantages: [B, T], or [B] where all tokens of an answer share one.
      mask: [B, T].
      clip: how far a ratio may fall, and rise, before it earns no more.
      clip_high: how far it may rise, where that differs (DAPO, arXiv:2503.14476, equation 10).
      dual_clip: the largest ratio that counts against a token of negative advantage, over 1 (arXiv:1912.09729).
      entropy: [B, T] of the policy's distributions, rewarded with `entropy_coef`.
      entropy_coef: its weight.

    Returns:
      The mean, scalar. Metrics: "clip_fraction" (tokens whose ratio is held, so that they teach nothing), "ratio_max"
      and "ratio_min", "kl_old" (k3 from the old policy), and "entropy" where it is given.

    Raises:
      InputError: dual_clip is not over 1.
    """
    surrogate_BT, ratio_BT, held_BT = clipped(
        log_probs, old_log_probs, advantages, mask, clip_low=clip,
        clip_high=clip if clip_high is None else clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    loss = -masked.mean(surrogate_BT, mask)
    metrics = ratio_metrics(log_probs, old_log_probs, ratio_BT, held_BT, mask)
    if entropy is not None:
        metrics["entropy"] = masked.mean(entropy, mask)
        loss -= entropy_coef * metrics["entropy"]
    return loss, metrics


def clipped(
    log_probs, old_log_probs, advantages, mask, *, clip_low, clip_high, dual_clip=None, per_sequence=False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the clipped surrogate, the ratios, and where the clip holds the gradient back; each [B, T].

    Arguments as in `policy_loss`. With per_sequence an answer has one ratio, the geometric mean of its tokens' (GSPO,
    arXiv:2507.18071, equation 7).

    Raises:
      InputError: dual_clip is not over 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise InputError(f"dual_clip is {dual_clip}; expected over 1, such as 3")
    seen_BT = mask != 0
    advantage_BT = advantages.astype(jnp.float32).reshape(advantages.shape[0], -1)
    log_ratio_BT = log_probs.astype(jnp.float32) - jax.lax.stop_gradient(old_log_probs.astype(jnp.float32))
    log_ratio_BT = jnp.where(seen_BT, log_ratio_BT, 0.0)  # before exp: what is masked must not reach the gradient
    if per_sequence:
        log_ratio_BT = jnp.broadcast_to(masked.mean(log_ratio_BT, mask, axis=1)[:, None], log_ratio_BT.shape)
    ratio_BT = jnp.exp(log_ratio_BT)
    free_BT = ratio_BT * advantage_BT
    bound_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high) * advantage_BT
    surrogate_BT, held_BT = jnp.minimum(free_BT, bound_BT), bound_BT < free_BT
    if dual_clip is not None:
        floor_BT = dual_clip * advantage_BT
        held_BT |= (advantage_BT < 0) & (floor_BT > surrogate_BT)
        surrogate_BT = jnp.where(advantage_BT < 0, jnp.maximum(surrogate_BT, floor_BT), surrogate_BT)
    return jnp.where(seen_BT, surrogate_BT, 0.0), ratio_BT, held_BT & seen_BT


def ratio_metrics(log_probs, old_log_probs, ratio_BT, held_BT, mask) -> dict[str, jax.Array]:
    """Returns what tells whether an update went too far; ratios are 1 where masked."""
    return {
        "clip_fraction": masked.mean(held_BT, mask),
        "ratio_max": jnp.max(ratio_BT),
        "ratio_min": jnp.min(ratio_BT),
        "kl_old": masked.mean(divergence.per_token(old_log_probs, log_probs), mask),
    }


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float = 0.15
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over unmasked tokens of max((v - R)^2, (v_clipped - R)^2) / 2, v_clipped within clip of the old.

    Args:
      values: [B, T] of the value model that is trained.
      old_values: [B, T] when the answers were sampled.
      returns: [B, T] of `advantages`.
      mask: [B, T].
      clip: how far a value may move in one round; 0.15 in the Qwen report.

    Returns:
      The mean, scalar. Metrics: "clip_fraction", and "explained_variance" = 1 - var(R - v) / var(R): 1 is perfect, 0
      no better than a constant.
    """
    values, old_values, returns = (x.astype(jnp.float32) for x in (values, old_values, returns))
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values = jnp.where(mask != 0, values, returns)  # what is masked must not reach the gradient
    held_BT = old_values + jnp.clip(values - old_values, -clip, clip)
    free_BT, bound_BT = jnp.square(values - returns), jnp.square(held_BT - returns)
    variance = lambda x: masked.mean(jnp.square(x - masked.mean(x, mask)), mask)
    spread = variance(returns)
    metrics = {
        "clip_fraction": masked.mean(bound_BT > free_BT, mask),
        "explained_variance": 1.0 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0),
    }
    return masked.mean(jnp.maximum(free_BT, bound_BT), mask) / 2, metrics
