"""What reward models and preference optimisation share: rows of compared answers, the loop, a figure of each."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding
from qwen_jax.batches import PreferenceBatch
from qwen_jax.config import QwenConfig
from qwen_jax.data import loader, preferences, sources
from qwen_jax.data.preferences import PreferenceRows
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import hosts, loop, report, throughput
from qwen_jax.training.page import Block
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState


class Config(Protocol):
    """The fields that an experiment on comparisons has among its own."""

    model: QwenConfig
    loop: loop.LoopConfig
    dataset: str
    validation_dataset: str  # empty: a split of the first
    format: str
    bad_records: str
    template: str
    too_long: str  # "error" or "drop" a comparison with an answer over `limit`
    validation_prompts: int  # of each source that an evaluation reads; 0 for all
    limit: int  # tokens of a prompt and an answer
    length: int  # tokens in a row
    answers: int  # that a row has room for
    batch_size: int  # rows in a step, over all processes
    seed: int


class Data(NamedTuple):
    """Rows to train on, and those of each domain to evaluate on."""

    train: PreferenceRows
    validation: dict[str, PreferenceRows]


def data(config: Config, tok: Tokenizer, *, label: str) -> Data:
    """Returns the rows of an experiment, and says what became of the records.

    Raises:
      InputError: as `preferences.load` and `PreferenceRows`.
    """
    train, told = rows(config, tok, config.dataset, "train")
    for line in told:
        loop.say(label, f"train: {line}")
    return Data(train, held_out(config, tok, label=label))


def held_out(config: Config, tok: Tokenizer, *, label: str) -> dict[str, PreferenceRows]:
    """Returns domain -> the rows that each evaluation reads; says and raises as `data`."""
    dataset, found = config.validation_dataset or config.dataset, {}
    for name, short in zip(sources.names(dataset), sources.short_names(sources.names(dataset)), strict=True):
        found[short], told = rows(config, tok, name, "validation", most=config.validation_prompts)
        loop.say(label, f"validation: {short}: {told[-1]}")
    return found


def rows(
    config: Config, tok: Tokenizer, dataset: str, split: str, *, most: int = 0
) -> tuple[PreferenceRows, list[str]]:
    """Returns the rows of one split of a data set (at most so many prompts of each source), and lines about them."""
    if config.limit > config.model.max_position_embeddings:
        raise InputError(
            f"limit is {config.limit}, over model.max_position_embeddings {config.model.max_position_embeddings}"
        )
    rendering = Rendering(config.template, "last-turn", config.limit, config.too_long, config.format, pairs=True)
    hold_out = not config.validation_dataset
    answers, told = preferences.load(
        dataset, split, tok, rendering, bad_records=config.bad_records, hold_out=hold_out, most=most
    )
    made = PreferenceRows(answers, config.length, config.answers)
    return made, [*told, f"{told[-1]} in {len(made):,} rows, {made.efficiency:.1%} full"]


def batch(config: Config) -> PreferenceBatch:
    """Returns one global batch as structs."""
    of = lambda dtype, size: jax.ShapeDtypeStruct((config.batch_size, size), dtype)
    token, answer = functools.partial(of, size=config.length), functools.partial(of, size=config.answers)
    i, f = jnp.int32, jnp.float32
    return PreferenceBatch(token(i), token(i), token(f), token(i), token(i), answer(i), answer(i), answer(f), answer(f))


def fit(
    program: Program,
    train: PreferenceRows | loop.Batches,
    validation: Mapping[str, PreferenceRows],
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
      program: from `program.build`, its batch as `batch` says.
      train: rows, shuffled by config.seed, shared out over processes, read for ever; or batches that are made as they
        are needed.
      validation: domain -> rows; every evaluation reads them all.
      config: of the experiment.
      workdir: from `workdir.prepare`.
      experiment: what its lines are headed with.
      initial: makes the state of step 0.
      frozen: the arrays of program.frozen.
      sample, sample_every: as in `loop.fit`.

    Returns:
      The state after the last step.
    """
    sampled = not isinstance(train, PreferenceRows)
    loop.say(
        experiment,
        f"{config.model.param_counts()['total']:,} parameters; {'sampled' if sampled else f'{len(train):,}'} rows of "
        f"{config.length} tokens; {config.loop.steps} steps; mesh {dict(program.layout.mesh.shape)}",
    )
    share = sharding.share(program.batch.tokens)
    held_out = functools.partial(loader.evaluation, batch_size=config.batch_size, **share)
    with contextlib.ExitStack() as stack:
        batches = train
        if not sampled:
            batches = loader.batches(train, batch_size=config.batch_size, seed=config.seed, **share)
            stack.callback(batches.close)
        return loop.fit(
            program,
            batches,
            config=config.loop,
            workdir=workdir,
            initial=initial,
            validation={domain: functools.partial(held_out, some) for domain, some in validation.items()},
            flops_per_token=throughput.train_flops_per_token(config.model, config.length, frozen=bool(frozen)),
            label=experiment,
            frozen=frozen,
            sample=sample,
            sample_every=sample_every,
        )


def keep_reference(
    path: pathlib.Path,
    parts: Mapping[str, PreferenceRows],
    function: Callable,
    program: Program,
    reference: Callable[[], dict],
    *,
    label: str,
) -> None:
    """Gives every row the reference model's log-probabilities: those in the file, or they are computed and kept there.

    Args:
      path: the file, .npz.
      parts: name in the file -> rows.
      function: (batch, parameters) -> [B, A] float32 log-probability of each answer.
      program: its mesh and batch.
      reference: gives the reference's parameters; called only where there is no file.
      label: goes before the line that says so.
    """
    if not path.exists():
        loop.say(label, f"computing the reference's log-probabilities, once: {path}")
        params = reference()
        found = {name: of_each_answer(function, some, program, params) for name, some in parts.items()}

        def write():
            scratch = path.with_name("reference.partial.npz")
            np.savez(scratch, **found)
            scratch.rename(path)

        hosts.once(write)
    with np.load(path) as kept:
        for name, some in parts.items():
            some.reference[:] = kept[name]


def write_report(
    config: Config, train: PreferenceRows | None, *, workdir: pathlib.Path, title: str, more: Sequence[Block]
) -> None:
    """Writes report.md with the run's curves and what the experiment has to say besides."""
    read = config.loop.steps * config.batch_size
    budget = train and report.Budget(read, config.length, 1 - train.efficiency, [read / len(train)])
    report.write(workdir, title=title, budget=budget, unit="nats per comparison", more=more)


def of_each_answer(function: Callable, some: PreferenceRows, program: Program, *arguments) -> np.ndarray:
    """Computes a figure of every answer, on the program's mesh.

    Args:
      function: (batch, *arguments) -> [B, A] float32; compiled here.
      some: the rows.
      program: its mesh and batch.
      arguments: arrays that are on the mesh.

    Returns:
      [n] float32 in the order of some.answers.
    """
    whole = sharding.replicated(program.layout)
    compute = jax.jit(function, out_shardings=whole)
    rows = program.batch.tokens.shape[0]
    found, place = np.zeros(len(some.answers.values), np.float32), 0
    for host in loader.evaluation(some, batch_size=rows, **sharding.share(program.batch.tokens)):
        figures = np.asarray(jax.device_get(compute(sharding.put(host, program.batch), *arguments)))
        for row in figures[: len(some) - place]:
            members = some.members(place)
            found[members], place = row[: len(members)], place + 1
    return found
