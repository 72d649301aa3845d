"""The one train step. Objectives only say what the loss is; SFT, reward models, DPO and PPO all run this."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qwen_jax.batches import Loss
from qwen_jax.training.optimizer import learning_rate
from qwen_jax.training.state import TrainState

# (params, batch, key) -> Loss. One that has a parameter `tally` besides is given the sum of Loss.tally over the step's
# earlier microbatches, None for the first: a statistic of the whole batch that grows as the microbatches go by.
LossFn = Callable[..., Loss]


def train_step(
    state: TrainState, batch, *, loss_fn: LossFn, tx: optax.GradientTransformation, microbatches: int = 1
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on sum(Loss.total) / sum(Loss.weight) over all microbatches.

    Totals and weights are added up and divided once, so the result is that of the whole batch however it is cut and
    however unevenly its weights (tokens) fall. A step whose loss, gradient or update is not finite changes neither
    parameters nor optimizer: it is counted in the metric "skipped".

    Args:
      state: donated by the caller.
      batch: pytree of arrays [B, ...].
      loss_fn: (params, batch, key) -> Loss.
      tx: the optimizer, from `optimizer.make`.
      microbatches: into how many the batch is cut; divides B. Activations are held for one at a time.

    Returns:
      The next state; float32 scalars: loss, weight, grad_norm (before clipping), learning_rate, skipped, and the
      metrics of the loss as means under its weight.
    """
    grads, loss = _accumulate(state, batch, loss_fn, microbatches)
    weight = jnp.where(loss.weight > 0, loss.weight, 1.0)
    grads = jax.tree.map(lambda grad: grad / weight, grads)
    mean, grad_norm = loss.total / weight, optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    # The update too: a rate or a moment can overflow where loss and gradient did not.
    finite = jnp.isfinite(mean) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    new_state = state._replace(
        step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state)
    )
    metrics = {
        **{name: total / weight for name, total in loss.metrics.items()},
        "loss": mean,
        "weight": loss.weight,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate(opt_state),
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    return new_state, metrics


def _accumulate(state: TrainState, batch, loss_fn: LossFn, microbatches: int):
    """Returns the sums of gradients and of Loss over the microbatches."""

    tallied = "tally" in inspect.signature(loss_fn).parameters

    def summed(params, batch, key, tally=None):
        loss = loss_fn(params, batch, key, tally=tally) if tallied else loss_fn(params, batch, key)
        return loss.total, loss

    grad_fn = jax.grad(summed, has_aux=True)
    key = state.step_key()
    if microbatches == 1:
        return grad_fn(state.params, batch, jax.random.fold_in(key, 0))

    # Row r goes to microbatch r % microbatches: every device keeps the rows it has.
    cut = lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
    numbered = (jnp.arange(microbatches), jax.tree.map(cut, batch))

    def add(sums, numbered):
        index, microbatch = numbered
        new = grad_fn(state.params, microbatch, jax.random.fold_in(key, index), sums[1].tally)
        return jax.tree.map(jnp.add, sums, new), None

    first = jax.tree.map(lambda x: x[0], numbered[1])
    shapes = jax.eval_shape(grad_fn, state.params, first, key)
    zeros = jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), shapes)
    return jax.lax.scan(add, zeros, numbered)[0]


def eval_step(params, batch, *, loss_fn: LossFn) -> Loss:
    """Returns the Loss of a batch, as sums to add up over batches."""
    return loss_fn(params, batch, jax.random.key(0))
