"""Train state: the arrays that a step takes and gives back, and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """Everything that changes while training.

    Attributes:
      step: int32, how many batches were taken, skipped ones included.
      params: nested dict of arrays, the float32 masters.
      opt_state: what optax keeps.
      key: [2] uint32 key data of the run. Steps fold their number into it, so it never changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array

    def step_key(self) -> jax.Array:
        """Returns the random key of this step: a function of the run's seed and the step's number."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)


def create(params, key: jax.Array, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key_data(key))
