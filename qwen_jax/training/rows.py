"""Training on rows: batches drawn from them, held-out ones evaluated by domain, the loop on both."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qwen_jax import sharding
from qwen_jax.config import QwenConfig
from qwen_jax.data import buckets, loader
from qwen_jax.data.buckets import BucketRows
from qwen_jax.training import loop, throughput
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState


class Config(Protocol):
    """The fields that an experiment on rows has among its own."""

    model: QwenConfig
    loop: loop.LoopConfig
    length: int  # tokens in a row
    batch_size: int  # rows in a step, over all processes
    seed: int


def fit(
    program: Program,
    train: Sequence[Any] | BucketRows | loop.Batches,
    validation: Mapping[str, Sequence[Any]],
    *,
    config: Config,
    workdir: pathlib.Path,
    experiment: str,
    initial: Callable[[], TrainState],
    frozen: tuple = (),
    sample: Callable[..., list[dict]] | None = None,
    sample_every: int = 0,
) -> TrainState:
    """Trains on batches of rows to the end, or on from where the folder stands.

    Args:
      program: from `program.build`, its batch [batch_size, length].
      train: rows [length], or of several lengths; shuffled by config.seed, shared out over processes, read for ever. Or
        batches of such rows that are made as they are needed.
      validation: domain -> rows [length]; every evaluation reads them all.
      config: of the experiment.
      workdir: from `workdir.prepare`.
      experiment: what its lines are headed with.
      initial: makes the state of step 0.
      frozen: the arrays of program.frozen.
      sample, sample_every: as in `loop.fit`.

    Returns:
      The state after the last step.

    Raises:
      InputError: as `loop.fit` and `data.loader.batches`.
    """
    made = hasattr(train, "get_state")
    tokens = config.loop.steps * config.batch_size * config.length
    loop.say(
        experiment,
        f"{config.model.param_counts()['total']:,} parameters; {'sampled' if made else f'{len(train):,}'} rows of "
        f"{config.length} tokens; {config.loop.steps} steps, {tokens:,} tokens; mesh {dict(program.layout.mesh.shape)}",
    )
    share = sharding.share(program.batch.tokens)
    held_out = functools.partial(loader.evaluation, batch_size=config.batch_size, **share)
    with contextlib.ExitStack() as stack:
        batches = train
        if not made:
            draw = buckets.batches if isinstance(train, BucketRows) else loader.batches
            batches = draw(train, batch_size=config.batch_size, seed=config.seed, **share)
            stack.callback(batches.close)
        return loop.fit(
            program,
            batches,
            config=config.loop,
            workdir=workdir,
            initial=initial,
            validation={domain: functools.partial(held_out, some) for domain, some in validation.items()},
            sample=sample,
            sample_every=sample_every,
            lengths=train.lengths if isinstance(train, BucketRows) else (),
            flops_per_token=throughput.train_flops_per_token(config.model, config.length, frozen=bool(frozen)),
            label=experiment,
            frozen=frozen,
        )
