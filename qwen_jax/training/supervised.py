"""What pretraining and fine-tuning share once their rows are made: the loop on them, samples, and the report."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qwen_jax.batches import LMBatch
from qwen_jax.config import LoraConfig
from qwen_jax.data.buckets import BucketRows
from qwen_jax.data.packing import MixedRows
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import loop, report, rows, samples
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState


class Config(rows.Config, Protocol):
    """The fields that an experiment on tokens has among its own."""

    samples: samples.SamplesConfig


def fit(
    program: Program,
    train: Sequence[LMBatch] | BucketRows,
    validation: Mapping[str, Sequence[LMBatch]],
    tok: Tokenizer,
    *,
    config: Config,
    workdir: pathlib.Path,
    experiment: str,
    recipe: str,
    initial: Callable[[], TrainState],
    lora: LoraConfig | None = None,
    frozen: tuple = (),
) -> TrainState:
    """Trains on batches of rows to the end, or on from where the folder stands, and writes report.md.

    Args:
      program: from `program.build`, its batch [batch_size, length].
      train: rows [length], or of several lengths; shuffled by config.seed, shared out over processes, read for ever.
      validation: domain -> rows [length]; every evaluation reads them all, and the first are continued as samples.
      tok: what the rows were made with.
      config: of the experiment.
      workdir: from `workdir.prepare`.
      experiment, recipe: what its lines and the report are headed with.
      initial: makes the state of step 0.
      lora: of the adapters that are trained beside the frozen model, if there are.
      frozen: the arrays of program.frozen.

    Returns:
      The state after the last step.

    Raises:
      InputError: as `rows.fit`.
    """
    state = rows.fit(
        program, train, validation, config=config, workdir=workdir, experiment=experiment, initial=initial,
        frozen=frozen, sample_every=config.samples.every,
        sample=samples.sampler(config.model, tok, validation, config=config.samples, layout=program.layout, lora=lora),
    )  # fmt: skip
    report.write(workdir, title=f"{experiment} {recipe}", budget=budget(config, train))
    loop.say(experiment, f"done: figures in {workdir / 'report.md'}, model in {workdir / 'checkpoints'}")
    return state


def budget(config: Config, train: Sequence[LMBatch] | BucketRows) -> report.Budget:
    """Returns what a whole run reads; of short rows several count as one of config.length."""
    count = config.loop.steps * config.batch_size
    if isinstance(train, BucketRows):
        shares = [weight / sum(train.weights) for weight in train.weights]
        places = [len(part) * part.length for part in train.parts]
        epochs = [count * config.length * share / size for share, size in zip(shares, places, strict=True)]
        return report.Budget(rows=count, length=config.length, padding=1 - train.efficiency, epochs=epochs)
    if isinstance(train, MixedRows):
        shares = [weight / sum(train.weights) for weight in train.weights]
        epochs = [count * share / len(part) for part, share in zip(train.parts, shares, strict=True)]
        padding = sum(share * (1 - part.efficiency) for part, share in zip(train.parts, shares, strict=True))
    else:
        epochs, padding = [count / len(train)], 1 - train.efficiency
    return report.Budget(rows=count, length=config.length, padding=padding, epochs=epochs)
