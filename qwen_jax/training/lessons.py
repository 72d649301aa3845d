"""What a step of reinforcement learning starts from, what its updates read, and the statistics it keeps.

Shapes: B answers, T places of a row.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.batches import LMBatch, Rollout
from qwen_jax.errors import InputError
from qwen_jax.objectives import masked

NOTHING = ()  # stands where a tree has no such part


@dataclass(frozen=True)
class UpdatesConfig:
    """How a rollout is learned from."""

    epochs: int = 1  # passes over a rollout, each in an order of its own
    minibatches: int = 1  # updates in a pass
    microbatches: int = 1  # of each update: gradient accumulation
    value_only: int = 0  # first updates of the run that leave the policy alone
    stop_kl: float = 0.0  # nats a token from the old policy; the first update that finds more is a step's last; 0: off
    truncate: float = 0.0  # most that an importance weight counts, see `importance`; 0: all count 1
    rewards: Literal["as-is", "centred", "scaled"] = "as-is"  # less the run's mean so far; and by its deviation

    def __post_init__(self):
        for name, least in (("epochs", 1), ("minibatches", 1), ("microbatches", 1), ("value_only", 0)):
            if getattr(self, name) < least:
                raise InputError(f"updates.{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("stop_kl", "truncate"):
            if not getattr(self, name) >= 0:
                raise InputError(f"updates.{name} is {getattr(self, name)}; expected 0 (off) or more")

    @property
    def each_step(self) -> int:
        """How many updates a step of the loop makes."""
        return self.epochs * self.minibatches


class Moments(NamedTuple):
    """Of all rewards so far, float32 scalars: how many, their mean, and the sum of squares around it."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array


class RLState(NamedTuple):
    """What changes while a policy learns; the first four are its `TrainState`, so that its checkpoints are a model's.

    Attributes:
      step: int32, rollouts learned from.
      params, opt_state, key: of the policy, or of its adapters.
      value: TrainState of the value model, () where there is none.
      moments: of the rewards.
      kl_coef: float32, weight of the distance from the reference, where it adapts.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    value: Any
    moments: Moments
    kl_coef: jax.Array


class Lesson(NamedTuple):
    """What all updates of a step learn from; no gradient flows into it.

    Attributes:
      tokens, segment_ids, mask: [B, T] as in Rollout.
      old_log_probs: [B, T] float32, under the policy before the first update, by the pass that trains.
      ref_log_probs: [B, T] float32 under the reference; () without one.
      advantages: [B, T] float32.
      old_values, returns: [B, T] float32; () without a value model.
    """

    tokens: Any
    segment_ids: Any
    mask: Any
    old_log_probs: Any
    ref_log_probs: Any
    advantages: Any
    old_values: Any
    returns: Any


class Experience(NamedTuple):
    """A batch of the loop: the rollout, and rows of text whose likelihood is learned besides, () for none."""

    rollout: Rollout
    mixed: LMBatch | tuple = NOTHING


def lesson_struct(rows: int, length: int, *, reference: bool, value: bool) -> Lesson:
    """Returns a minibatch as structs."""
    ints, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    of_value = (floats if value else NOTHING,) * 2
    return Lesson(ints, ints, floats, floats, floats if reference else NOTHING, floats, *of_value)


def rollout_struct(rows: int, length: int) -> Rollout:
    """Returns a rollout as structs."""
    ints, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    of_rows = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32))
    return Rollout(ints, ints, floats, floats, floats, *of_rows)


def normalised(moments: Moments, rewards_B: jax.Array, seen_B: jax.Array, how: str) -> tuple[Moments, jax.Array]:
    """Returns the moments of all rewards so far, these among them, and the rewards as they are learned from.

    Means are merged by Chan's formula, which loses nothing where the mean is large beside the deviation.
    """
    seen_B &= jnp.isfinite(rewards_B)
    new = jnp.sum(seen_B.astype(jnp.float32))
    mean = masked.mean(rewards_B, seen_B)
    count, delta = moments.count + new, mean - moments.mean
    share = new / jnp.maximum(count, 1.0)
    squares = moments.squares + masked.total(jnp.square(rewards_B - mean), seen_B)
    squares += jnp.square(delta) * moments.count * share
    moments = Moments(count, moments.mean + delta * share, squares)
    if how == "as-is":
        return moments, rewards_B
    centred_B = rewards_B - moments.mean
    if how == "centred":
        return moments, centred_B
    return moments, centred_B * jax.lax.rsqrt(moments.squares / jnp.maximum(count, 1.0) + 1e-8)


def importance(old_log_probs: jax.Array, sampling_log_probs: jax.Array, most: float) -> jax.Array:
    """Returns min(p_old(token) / p_sampled(token), most), the weight of a token that another policy drew.

    Truncated importance sampling, as for rollouts that are a step old, that come from other kernels, or that were
    filtered (top-p): the ratio of the clipped objective is then that of the policy to `old` alone (arXiv:2505.24298).
    """
    return jnp.minimum(jnp.exp(old_log_probs - sampling_log_probs), most)
