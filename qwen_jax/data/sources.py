"""Data sets by name: where an experiment's `dataset` field leads.

A data set is one source or several, separated by commas, each with a weight after a colon or none:

    chitchat                              a name of NAMES
    ratings-films   ratings-tweets-8      rated sentences of a domain of `data.ratings`, as pairs or as lists of 8
    chats.jsonl.gz   chats/   gs://b/c/*.parquet   files of records (`data.files`), in a format of `data.formats`
    my_chats   my_chats/config:1.0.0      a TFDS data set, its records in such a format
    a.jsonl:0.7,b.parquet:0.3             a mixture: seven rows of the first to three of the second, for ever
    a.jsonl,b.parquet                     all of both, once an epoch

A split of a source that has none by that name is told by a hash of what is said: of files, a twentieth is "validation",
whatever is added or removed, and copies of a conversation are never in both.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.data import files, formats, packages
from qwen_jax.errors import InputError

CHATS = ("chitchat", "made-up", "chinese-reviews", "python-code")
NAMES = (*CHATS, "made-up-pairs", "ratings-DOMAIN")
_RATINGS = re.compile(r"ratings-([a-z]+)(?:-([2-9]|1[0-6]))?")
HELD_OUT = 5  # percent
_SPLITS = {"train": range(HELD_OUT, 100), "validation": range(HELD_OUT)}
_LISTS = ("messages", "conversations", "chosen", "rejected", "prompt", "tools", "history", "answers")


class Part(Protocol):
    """What records are read from: a file, a TFDS split, a list."""

    name: str
    unit: str  # what the numbers of records count

    def fingerprint(self) -> str | None:
        """Hash of the content; None of what is in memory anyway."""

    def records(self) -> Iterator[tuple[int, Any]]:
        """Yields (number, record), in order; a record is JSON as bytes, an object, or a `formats.BadRecord`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a data set.

    Attributes:
      name: as the user wrote it, without its weight.
      parts: what it is read from, in order.
      weight: of its rows in a mixture; None where none was given.
      percents: which of the hundred hash classes of records belong to the split (`formats.percent_of`).
    """

    name: str
    parts: tuple[Part, ...]
    weight: float | None = None
    percents: range = range(100)


def find(dataset: str, split: str, *, hold_out: bool = True) -> list[Source]:
    """Finds what a data set consists of; reads no record yet.

    Args:
      dataset: as the module says.
      split: "train", "validation", "test", or another that the source has.
      hold_out: if False, a source without splits is taken whole.

    Raises:
      InputError: a source is not found, or has no such split; or only some have weights.
    """
    return [dataclasses.replace(_source(name, split, hold_out), weight=weight) for name, weight in weighted(dataset)]


def weighted(dataset: str) -> list[tuple[str, float | None]]:
    """Returns the sources that a data set names, each with its weight; None where there are no weights.

    Raises:
      InputError: nothing is named, a weight is not above 0, or only some sources have one.
    """
    named = [_weighted(text.strip()) for text in dataset.split(",") if text.strip()]
    if not named:
        raise InputError(f"no data set is named; expected {', '.join(NAMES)}, files, or a TFDS data set")
    weights = [weight for _, weight in named]
    if any(weight is not None and weight <= 0 for weight in weights):
        raise InputError(f"{dataset}: the weight of a source has to be above 0")
    if None in weights and any(weight is not None for weight in weights):
        raise InputError(f"{dataset}: only some of its sources have a weight; expected all or none, as in a:0.7,b:0.3")
    return named


def names(dataset: str) -> list[str]:
    """Returns the names of a data set's sources, without weights."""
    return [_weighted(text.strip())[0] for text in dataset.split(",") if text.strip()]


def short_names(names: Sequence[str]) -> list[str]:
    """Returns names that can stand in those of figures: of files without folder and ending, each another."""
    short = [pathlib.PurePath(name).name.split(".")[0] if files.looks_like_path(name) else name for name in names]
    short = [name.replace("/", "_") or "files" for name in short]
    return [name if short.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(short, 1)]


def load(dataset: str, split: str, *, hold_out: bool = True) -> Sequence[list[dict]] | Iterator[list[dict]]:
    """The conversations of a split, each a list of OpenAI messages, in order.

    Args:
      dataset: as the module says; weights are of no matter.
      split, hold_out: as in `find`.

    Raises:
      InputError: as `find`; also, while it is read, on the first record that is no conversation.
    """
    if dataset in CHATS:
        return _known(dataset, split)
    return _conversations(find(dataset, split, hold_out=hold_out))


def _known(name: str, split: str) -> Sequence:
    """The conversations of one of CHATS, or the records of what is compared."""
    if name == "chitchat":
        from qwen_jax.data import chitchat

        return chitchat.load(split)
    if name == "made-up":
        from qwen_jax.data import made_up

        return made_up.load(split)
    if name == "made-up-pairs":
        from qwen_jax.data import made_up

        return made_up.pairs(split)
    if match := _RATINGS.fullmatch(name):
        from qwen_jax.data import ratings

        return ratings.lists(match[1], split, size=int(match[2] or 2))
    from qwen_jax.data import texts

    return texts.load(name, split)


def _conversations(sources: list[Source]) -> Iterator[list[dict]]:
    for source in sources:
        for part in source.parts:
            name = None
            for number, record in part.records():
                try:
                    record = formats.parsed(record)
                    name = name or formats.detect(record)
                    messages = formats.conversation(record, name).messages
                except formats.BadRecord as error:
                    raise InputError(f"{part.name}, {part.unit} {number}: {error}") from None
                if formats.percent_of(formats.content_hash(messages)) in source.percents:
                    yield messages


def _weighted(text: str) -> tuple[str, float | None]:
    name, colon, tail = text.rpartition(":")
    try:
        return (name, float(tail)) if colon and name else (text, None)
    except ValueError:
        return text, None


def _source(name: str, split: str, hold_out: bool) -> Source:
    if name == "chitchat":
        from qwen_jax.data import chitchat

        return Source(name, (Examples.of(chitchat.build(), split),))
    if name in (*CHATS, "made-up-pairs") or _RATINGS.fullmatch(name):
        return Source(name, (Listed(f"{name} {split}", _known(name, split)),))
    if files.looks_like_path(name):
        return Source(name, tuple(files.find(name)), percents=_percents(name, split, hold_out))
    builder = _tfds_builder(name)
    splits = builder.info.splits
    if split in splits and not (split == "train" and hold_out and "validation" not in splits):
        return Source(name, (Examples(name, builder, split),))
    if "train" not in splits:
        raise InputError(f"{name}: no split {split!r}; TFDS has {', '.join(splits)} of it")
    return Source(name, (Examples(name, builder, "train"),), percents=_percents(name, split, hold_out))


def _percents(name: str, split: str, hold_out: bool) -> range:
    if not hold_out:
        return range(100)
    if split not in _SPLITS:
        raise InputError(f"{name}: no split {split!r}; expected one of {', '.join(_SPLITS)}")
    return _SPLITS[split]


def _tfds_builder(name: str):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # what is prepared already stays in its format
            builder.download_and_prepare(file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise InputError(
            f"no data set is called {name!r}: it is none of {', '.join(NAMES)}, no file or folder, and TFDS knows none "
            "of that name"
        ) from None
    except Exception as error:  # whatever a builder of others raises where its data cannot be had
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"TFDS cannot give {name}: {reason}") from None
    # The others need TensorFlow, and TFDS 4.9.10 leaves out half of a split that it writes as Parquet.
    if (stored := builder.info.file_format.value) != "array_record":
        raise InputError(
            f"TFDS has {name} in {builder.data_dir} as {stored}, which cannot be read here; expected array_record: "
            f"remove it, or prepare it with `tfds build {name} --file_format=array_record`"
        )
    return builder


class Listed(NamedTuple):
    """Records in memory."""

    name: str
    items: Sequence[Any]
    unit: str = "number"

    def fingerprint(self) -> None:
        return None

    def records(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.items)


class Examples(NamedTuple):
    """The examples of a TFDS split."""

    name: str
    builder: Any
    split: str
    unit: str = "example"

    @classmethod
    def of(cls, folder: pathlib.Path, split: str) -> "Examples":
        """The split of a data set that was prepared in a folder."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        if split not in builder.info.splits:
            raise InputError(f"{builder.name}: no split {split!r}; there are {', '.join(builder.info.splits)}")
        return cls(builder.name, builder, split)

    def fingerprint(self) -> str:
        paths = self.builder.info.splits[self.split].filepaths
        return hashlib.sha256(json.dumps([packages.file_sha256(path) for path in paths]).encode()).hexdigest()

    def records(self) -> Iterator[tuple[int, Any]]:
        source = self.builder.as_data_source(self.split)
        return ((number, _plain(source[number])) for number in range(len(source)))


def _plain(value: Any, name: str = "") -> Any:
    """TFDS's arrays and bytes as the lists and texts that they were; a list of objects comes as an object of lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        plain = {key: _plain(inner, key) for key, inner in value.items()}
        if name in _LISTS and plain and all(isinstance(inner, list) for inner in plain.values()):
            return [dict(zip(plain, turn, strict=True)) for turn in zip(*plain.values(), strict=True)]
        return plain
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value, name) if isinstance(value, bytes | list) else value
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
