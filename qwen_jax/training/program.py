"""What a run compiles: the shapes of its state and batch, and its jitted functions. Building one touches no device.

The dry run compiles exactly what the run runs, because both take it from here.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout
from qwen_jax.training.state import TrainState, create
from qwen_jax.training.step import LossFn, eval_step, train_step


@dataclass(frozen=True)
class Program:
    """Abstract arrays (shape, dtype, sharding) and functions of them.

    Attributes:
      layout: the mesh and the rules everything here was built for.
      state: TrainState of ShapeDtypeStructs.
      batch: pytree of ShapeDtypeStructs, one global batch.
      init: (key, *frozen) -> TrainState, each device making its own part.
      start: (params, key) -> TrainState from parameters that exist already; donates them.
      train_step: (state, batch, *frozen) -> (state, metrics); donates the state, and only that.
      eval_step: (params, batch, *frozen) -> Loss.
      frozen: trees of ShapeDtypeStructs that the loss reads and nothing trains: the base of LoRA adapters, say. Their
        arrays are plain arguments, in no checkpoint.
    """

    layout: Layout
    state: TrainState
    batch: Any
    init: Callable[[jax.Array], TrainState]
    start: Callable[[Any, jax.Array], TrainState]
    train_step: Callable
    eval_step: Callable
    frozen: tuple = ()

    def batches(self, lengths: Sequence[int] = ()) -> dict[int, Any]:
        """Returns row length -> a training batch: `batch` itself, or of each of these lengths one with as many places.

        Raises:
          InputError: where a length does not divide that of `batch`, or the mesh does not divide it.
        """
        whole = jax.tree.leaves(self.batch)[0].shape[1]

        def of(struct, length: int) -> jax.ShapeDtypeStruct:
            rows, _, *rest = struct.shape
            shape, parts = (rows * whole // length, length, *rest), self.layout.size("length")
            if whole % length or length % parts:
                raise InputError(f"rows of {length} tokens do not divide {whole}, or cannot be cut into {parts} parts")
            return _struct(jax.ShapeDtypeStruct(shape, struct.dtype), struct.sharding)

        if not lengths:
            return {whole: self.batch}
        return {length: jax.tree.map(lambda s, length=length: of(s, length), self.batch) for length in lengths}


def build(
    *,
    init_params: Callable[..., Any],
    param_axes,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    batch,
    layout: Layout,
    microbatches: int = 1,
    eval_loss_fn: LossFn | None = None,
    frozen: Sequence[tuple[Any, Any]] = (),
    batch_axes: Any = None,
) -> Program:
    """Puts a model's initialiser, a loss and an optimizer together on a mesh.

    Args:
      init_params: (key, *frozen) -> parameters, traceable.
      param_axes: tree of logical axis names, one tuple for each parameter.
      loss_fn: (params, batch, key) -> Loss, with the keyword frozen=(trees of arrays) where there are any.
      tx: the optimizer.
      batch: pytree of anything with shape [B, ...] and dtype, one global batch; [B, T, ...] its first array.
      layout: mesh and rules.
      microbatches: gradient accumulation, see `train_step`.
      eval_loss_fn: the loss for evaluation (without dropout, say); loss_fn if None.
      frozen: (shapes, logical axes) of each tree that is read and not trained.
      batch_axes: tree of logical axis names, one tuple for each array of the batch; if None, all are [B, T, ...].

    Raises:
      InputError: where the mesh does not divide a parameter or the batch, or microbatches do not.
    """
    frozen = tuple(
        jax.tree.map(_struct, shapes, sharding.tree_shardings(axes, shapes, layout)) for shapes, axes in frozen
    )
    frozen_shardings = _shardings(frozen)
    state, state_shardings = _abstract_state(init_params, param_axes, tx, layout, frozen)
    batch = _abstract_batch(batch, batch_axes, layout, microbatches)
    batch_shardings = _shardings(batch)
    whole = sharding.replicated(layout)
    make = lambda key, *frozen: create(init_params(key, *frozen), key, tx)

    def step(state, batch, *frozen):
        return train_step(state, batch, loss_fn=_reading(loss_fn, frozen), tx=tx, microbatches=microbatches)

    def evaluate(params, batch, *frozen):
        return eval_step(params, batch, loss_fn=_reading(eval_loss_fn or loss_fn, frozen))

    return Program(
        layout=layout,
        state=state,
        batch=batch,
        frozen=frozen,
        init=jax.jit(make, out_shardings=state_shardings),
        start=jax.jit(
            functools.partial(create, tx=tx),
            in_shardings=(state_shardings.params, whole),
            out_shardings=state_shardings,
            donate_argnums=0,
        ),
        train_step=jax.jit(
            step,
            in_shardings=(state_shardings, batch_shardings, *frozen_shardings),
            out_shardings=(state_shardings, whole),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            evaluate,
            in_shardings=(state_shardings.params, batch_shardings, *frozen_shardings),
            out_shardings=whole,
        ),
    )


def _reading(loss_fn, frozen: tuple) -> LossFn:
    return functools.partial(loss_fn, frozen=frozen) if frozen else loss_fn


def _shardings(structs):
    return jax.tree.map(lambda struct: struct.sharding, structs)


def _abstract_state(init_params, param_axes, tx, layout, frozen):
    """Returns the TrainState as structs with shardings, and the shardings alone."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda *frozen: create(init_params(key, *frozen), key, tx), *frozen)
    whole = sharding.replicated(layout)
    params = sharding.tree_shardings(param_axes, shapes.params, layout)
    opt_state = optax.tree.map_params(
        tx, lambda _, where: where, shapes.opt_state, params, transform_non_params=lambda _: whole
    )  # moments lie where their parameters lie
    shardings = TrainState(whole, params, opt_state, whole)
    return jax.tree.map(_struct, shapes, shardings), shardings


def _abstract_batch(batch, axes, layout: Layout, microbatches: int):
    """Returns the batch as structs: rows over the batch axes, positions over the length axes unless `axes` differ."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if microbatches < 1 or rows % microbatches or not rows:
        raise InputError(f"batch_size {rows} cannot be cut into {microbatches} microbatches; expected a multiple")
    share = rows // microbatches
    if share % layout.size("batch"):
        raise InputError(
            f"batch_size {rows} / microbatches {microbatches} = {share} rows cannot be shared by the mesh axes "
            f"{', '.join(layout.rules.batch)}; expected a multiple of {layout.size('batch')}"
        )

    if axes is None:
        axes = jax.tree.map(lambda struct: ("batch", "length", *(None,) * (len(struct.shape) - 2)), batch)
    return jax.tree.map(
        lambda struct, names: _struct(struct, layout.sharding(names, struct.shape, what="batch")), batch, axes
    )


def _struct(struct, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=where)
