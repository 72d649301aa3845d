"""What pretraining and fine-tuning share once their rows are made: the loop on batches of rows, and its report."""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

from qwen_jax import sharding
from qwen_jax.batches import LMBatch
from qwen_jax.config import QwenConfig
from qwen_jax.data import loader
from qwen_jax.training import loop, report, throughput
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
    train: Sequence[LMBatch],
    validation: Sequence[LMBatch],
    *,
    config: Config,
    workdir: pathlib.Path,
    initial: Callable[[], TrainState],
    experiment: str,
    recipe: str,
    frozen: tuple = (),
) -> TrainState:
    """Trains on batches of rows to the end, or on from where the folder stands, and writes report.md.

    Args:
      program: from `program.build`, its batch [batch_size, length].
      train: rows [length]; shuffled by config.seed, shared out over processes, read for ever.
      validation: rows [length]; every evaluation reads them all.
      config: of the experiment.
      workdir: from `workdir.prepare`.
      initial: makes the state of step 0.
      experiment, recipe: what its lines and the report are headed with.
      frozen: the arrays of program.frozen.

    Returns:
      The state after the last step.

    Raises:
      InputError: as `loop.fit` and `data.loader.batches`.
    """
    tokens = config.loop.steps * config.batch_size * config.length
    loop.say(
        experiment,
        f"{config.model.param_counts()['total']:,} parameters; {len(train):,} rows of {config.length} tokens; "
        f"{config.loop.steps} steps, {tokens:,} tokens; mesh {dict(program.layout.mesh.shape)}",
    )
    share = sharding.share(program.batch.tokens)
    batches = loader.batches(train, batch_size=config.batch_size, seed=config.seed, **share)
    with contextlib.closing(batches):
        state = loop.fit(
            program,
            batches,
            config=config.loop,
            workdir=workdir,
            initial=initial,
            validation=lambda: loader.evaluation(validation, batch_size=config.batch_size, **share),
            flops_per_token=throughput.train_flops_per_token(config.model, config.length, frozen=bool(frozen)),
            label=experiment,
            frozen=frozen,
        )
    report.write(workdir, title=f"{experiment} {recipe}")
    loop.say(experiment, f"done: figures in {workdir / 'report.md'}, model in {workdir / 'checkpoints'}")
    return state
