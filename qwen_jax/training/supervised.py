"""What pretraining and fine-tuning share once their rows are made: the loop on batches of rows, and its report."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qwen_jax import sharding
from qwen_jax.batches import LMBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import buckets, loader
from qwen_jax.data.buckets import BucketRows
from qwen_jax.data.packing import MixedRows
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import loop, report, samples, throughput
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState


class Config(Protocol):
    """The fields that an experiment on rows has among its own."""

    model: QwenConfig
    loop: loop.LoopConfig
    samples: samples.SamplesConfig
    length: int  # tokens in a row
    batch_size: int  # rows in a step, over all processes
    seed: int


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
      InputError: as `loop.fit` and `data.loader.batches`.
    """
    tokens = config.loop.steps * config.batch_size * config.length
    loop.say(
        experiment,
        f"{config.model.param_counts()['total']:,} parameters; {len(train):,} rows of {config.length} tokens; "
        f"{config.loop.steps} steps, {tokens:,} tokens; mesh {dict(program.layout.mesh.shape)}",
    )
    share = sharding.share(program.batch.tokens)
    draw = buckets.batches if isinstance(train, BucketRows) else loader.batches
    batches = draw(train, batch_size=config.batch_size, seed=config.seed, **share)
    held_out = functools.partial(loader.evaluation, batch_size=config.batch_size, **share)
    with contextlib.closing(batches):
        state = loop.fit(
            program,
            batches,
            config=config.loop,
            workdir=workdir,
            initial=initial,
            validation={domain: functools.partial(held_out, rows) for domain, rows in validation.items()},
            sample=samples.sampler(
                config.model, tok, validation, config=config.samples, layout=program.layout, lora=lora
            ),
            sample_every=config.samples.every,
            lengths=train.lengths if isinstance(train, BucketRows) else (),
            flops_per_token=throughput.train_flops_per_token(config.model, config.length, frozen=bool(frozen)),
            label=experiment,
            frozen=frozen,
        )
    report.write(workdir, title=f"{experiment} {recipe}", budget=budget(config, train))
    loop.say(experiment, f"done: figures in {workdir / 'report.md'}, model in {workdir / 'checkpoints'}")
    return state


def budget(config: Config, train: Sequence[LMBatch] | BucketRows) -> report.Budget:
    """Returns what a whole run reads; of short rows several count as one of config.length."""
    rows = config.loop.steps * config.batch_size
    if isinstance(train, BucketRows):
        shares = [weight / sum(train.weights) for weight in train.weights]
        places = [len(part) * part.length for part in train.parts]
        epochs = [rows * config.length * share / size for share, size in zip(shares, places, strict=True)]
        return report.Budget(rows=rows, length=config.length, padding=1 - train.efficiency, epochs=epochs)
    if isinstance(train, MixedRows):
        shares = [weight / sum(train.weights) for weight in train.weights]
        epochs = [rows * share / len(part) for part, share in zip(train.parts, shares, strict=True)]
        padding = sum(share * (1 - part.efficiency) for part, share in zip(train.parts, shares, strict=True))
    else:
        epochs, padding = [rows / len(train)], 1 - train.efficiency
    return report.Budget(rows=rows, length=config.length, padding=padding, epochs=epochs)
