"""What reward models and preference optimisation share: their fields, rows of compared answers, a figure of each."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen_jax import sharding
from qwen_jax.batches import PreferenceBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import datasets, loader, preferences, ratings, sources
from qwen_jax.data.preferences import PreferenceRows
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import hosts, loop, optimizer, program, report
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.page import Block


@dataclasses.dataclass(frozen=True)
class Config:
    """One run on comparisons; an experiment adds what it makes of them."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    loop: loop.LoopConfig
    base: str = ""  # Hugging Face folder or workdir of a run to start from; "random" starts from nothing
    dataset: str = ratings.every()  # pairs or ranked lists: see docs/data.md
    validation_dataset: str = ""  # such another; empty: a split of the first
    validation_prompts: int = 0  # of each source that an evaluation reads; 0 for all
    format: str = "auto"
    bad_records: datasets.BadRecords = "error"
    template: str = "qwen2"
    too_long: Literal["error", "drop"] = "error"  # of a comparison with an answer over `limit`; none is ever cut
    limit: int = 512  # tokens of a prompt and an answer
    length: int = 768  # tokens in a row: it holds all answers to a prompt
    answers: int = 12  # that a row has room for
    batch_size: int = 8
    microbatches: int = 1
    dropout: float = 0.0  # of the embeddings and of what each layer adds, while training
    lora: LoraConfig = LoraConfig()  # rank 0: the whole model is trained; a score head always is
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


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


def build(
    config: Config, trained: dict, loss_fn: Callable, layout: Layout, *last: optax.GradientTransformation
) -> program.Program:
    """Returns the program of a run on comparisons; touches no device. Dropout is off at evaluation.

    Args:
      config: of the experiment.
      trained: what is trained, from `models.lora.trained`.
      loss_fn: (params, batch, key, *, lora, dropout) -> Loss, with the keyword frozen beside adapters.
      layout: mesh and rules.
      last: comes behind the optimizer.

    Raises:
      InputError: as `program.build`; where the base beside adapters would be quantised.
    """
    lora = config.lora
    if lora.quantised:
        raise InputError(
            f"lora.quantised is {lora.quantised!r}; expected '': comparisons are learned beside a whole base"
        )
    rates = {"b": lora.b_rate} if lora.b_rate != 1 else None
    return program.build(
        **trained,
        loss_fn=functools.partial(loss_fn, lora=lora, dropout=config.dropout),
        eval_loss_fn=functools.partial(loss_fn, lora=dataclasses.replace(lora, dropout=0.0)),
        tx=optax.chain(optimizer.make(config.optimizer, config.loop.steps, rates=rates), *last),
        batch=batch(config),
        batch_axes=PreferenceBatch.axes(),
        layout=layout,
        microbatches=config.microbatches,
    )


def keep_reference(
    path: pathlib.Path,
    parts: Mapping[str, PreferenceRows],
    function: Callable,
    built: program.Program,
    reference: Callable[[], dict],
    *,
    label: str,
) -> None:
    """Gives every row the reference model's log-probabilities: those in the file, or they are computed and kept there.

    The file knows what it was computed from: where the comparisons have changed since, they are computed anew.

    Args:
      path: the file, .npz.
      parts: name in the file -> rows.
      function: (batch, parameters) -> [B, A] float32 log-probability of each answer.
      built: its mesh and batch.
      reference: gives the reference's parameters; called only where they are asked.
      label: goes before the line that says so.
    """
    of_now = {f"content of {name}": np.array(digest(some)) for name, some in parts.items()}
    if path.exists():
        with np.load(path) as kept:
            known = {name: kept[name] for name in kept.files}
        if all(name in known and known[name] == value for name, value in of_now.items()):
            for name, some in parts.items():
                some.reference[:] = known[name]
            return
        loop.say(label, f"WARNING: the comparisons are no longer those that {path} was computed from")
    loop.say(label, f"computing the reference's log-probabilities, once: {path}")
    params = reference()
    for some in parts.values():
        some.reference[:] = of_each_answer(function, some, built, params)

    def write():
        scratch = path.with_name("reference.partial.npz")
        np.savez(scratch, **{name: some.reference for name, some in parts.items()}, **of_now)
        scratch.rename(path)

    hosts.once(write)


def digest(rows: PreferenceRows) -> str:
    """Returns a hash of what log-probabilities of these answers depend on: their tokens, and which are learned."""
    found = hashlib.sha256()
    for ids, mask in rows.answers.documents:
        found.update(np.array([len(ids)]).tobytes() + np.asarray(ids, np.int32).tobytes() + np.packbits(mask).tobytes())
    return found.hexdigest()


def write_report(
    config: Config, train: PreferenceRows | None, *, workdir: pathlib.Path, title: str, more: Sequence[Block]
) -> None:
    """Writes report.md with the run's curves and what the experiment has to say besides."""
    read = config.loop.steps * config.batch_size
    budget = train and report.Budget(read, config.length, 1 - train.efficiency, [read / len(train)])
    report.write(workdir, title=title, budget=budget, unit="nats per comparison", more=more)


def of_each_answer(function: Callable, some: PreferenceRows, built: program.Program, *arguments) -> np.ndarray:
    """Computes a figure of every answer, on the mesh of a program.

    Args:
      function: (batch, *arguments) -> [B, A] float32; compiled here.
      some: the rows.
      built: its mesh and batch.
      arguments: arrays that are on the mesh.

    Returns:
      [n] float32 in the order of some.answers.
    """
    whole = sharding.replicated(built.layout)
    compute = jax.jit(function, out_shardings=whole)
    rows = built.batch.tokens.shape[0]
    found, place = np.zeros(len(some.answers.values), np.float32), 0
    for host in loader.evaluation(some, batch_size=rows, **sharding.share(built.batch.tokens)):
        figures = np.asarray(jax.device_get(compute(sharding.put(host, built.batch), *arguments)))
        for row in figures[: len(some) - place]:
            members = some.members(place)
            found[members], place = row[: len(members)], place + 1
    return found
