"""Answers that people compared, as rows: all answers to a prompt side by side in one row, as many prompts as fit.

So a batch split by rows needs nothing from another device to compare answers, and a list of K answers, which holds
K (K - 1) / 2 comparisons, is read once. Shapes: T row length, A answers that a row has room for.
"""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.batches import PreferenceBatch
from qwen_jax.data import datasets, formats, packing, sources, token_cache
from qwen_jax.data.conversations import Document
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.templates import Message


class Answers(NamedTuple):
    """Rendered answers, those to one prompt next to each other.

    Attributes:
      documents: prompt and answer each.
      values: [n] float32, what people think of each.
      groups: [n] int64, which prompt it answers, ascending from 0.
      domains: [groups] names, where each prompt is from.
    """

    documents: Sequence[Document]
    values: np.ndarray
    groups: np.ndarray
    domains: list[str]


def load(
    dataset: str,
    split: str,
    tok: Tokenizer,
    rendering: Rendering,
    *,
    bad_records: datasets.BadRecords = "error",
    hold_out: bool = True,
    most: int = 0,
) -> tuple[Answers, list[str]]:
    """The rendered answers of a data set's split.

    Args:
      dataset, split, hold_out: as in `sources.find`; a source's name is its domain.
      tok: the tokenizer.
      rendering: with pairs; its max_length is the limit of a prompt and an answer together.
      bad_records: as in `datasets.rows`.
      most: prompts of each source, the first; 0 for all.

    Returns:
      The answers, and what they were made of, as lines for the reader.

    Raises:
      InputError: as `token_cache.tokenised`; on bad records that are not to be skipped; where nothing is left.
    """
    named = sources.find(dataset, split, hold_out=hold_out)
    if named[0].weight is not None:
        raise InputError(f"{dataset}: sources of comparisons have no weights; expected names alone")
    found = token_cache.tokenised(named, tok, rendering)
    accounts = [account for made in found for account in made.accounts]
    if bad_records == "error":
        datasets.refuse_bad(accounts)
    documents = datasets.joined([made.documents for made in found])
    if not len(documents):
        raise InputError(f"{dataset}: no comparison for split {split!r} ({'; '.join(map(str, accounts[:3]))})")
    kept, values, sizes, domains, start = [], [], [], [], 0
    for made in found:
        mine = _sizes(made.documents.compared)[: most or None]
        kept.append(start + np.arange(sum(mine)))
        values.append(made.documents.values[: sum(mine)])
        sizes += mine
        domains += [made.source.name] * len(mine)
        start += len(made.documents)
    taken = _Taken(documents, np.concatenate(kept))
    told = [line for account in accounts for line in (str(account), *account.lines())]
    told.append(f"{len(taken):,} answers to {len(sizes):,} prompts, {int(taken.lengths.sum()):,} tokens")
    return Answers(taken, np.concatenate(values), np.repeat(np.arange(len(sizes)), sizes), domains), told


def _sizes(compared: np.ndarray) -> list[int]:
    """How many answers each prompt has, from how many stand together with each answer."""
    sizes, place = [], 0
    while place < len(compared):
        sizes.append(int(compared[place]))
        place += sizes[-1]
    return sizes


class _Taken(Sequence):
    """Some of a sequence of documents, by their numbers, with their lengths."""

    def __init__(self, documents: Sequence[Document], numbers: np.ndarray):
        self._documents, self._numbers, self.lengths = documents, numbers, documents.lengths[numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        return self._documents[int(self._numbers[index])]


def texts(dataset: str, split: str) -> Iterator[str]:
    """What is said in the comparisons (or chats) of a split.

    Raises:
      InputError: as `sources.find`; also, while it is read, on the first record that is neither.
    """
    for prompt, answers in _said(dataset, split):
        yield from (message["content"] for message in (*prompt, *answers))


def prompts(dataset: str, split: str, *, most: int) -> list[list[Message]]:
    """The first `most` different prompts of a split: of comparisons, or of chats up to their last answer.

    Raises:
      InputError: as `texts`.
    """
    found: dict[str, list[Message]] = {}
    for prompt, _ in _said(dataset, split):
        found.setdefault(json.dumps(prompt), prompt)
        if len(found) == most:
            break
    return list(found.values())


def beginnings(dataset: str, split: str, *, words: int, most: int) -> list[tuple[list[Message], str]]:
    """Prompts with the first words of what the data answers, for a model to go on from: `most` different ones.

    Answers of no more than `words` words are passed over.

    Raises:
      InputError: as `texts`.
    """
    found: dict[str, tuple[list[Message], str]] = {}
    for prompt, answers in _said(dataset, split):
        for answer in answers:
            said = answer["content"].split()
            if len(said) > words and len(found) < most:
                begin = " ".join(said[:words])
                found.setdefault(json.dumps([prompt, begin]), (prompt, begin))
        if len(found) == most:
            break
    return list(found.values())


def _said(dataset: str, split: str) -> Iterator[tuple[list[Message], list[Message]]]:
    """Yields the prompt and the answers of each record of a split."""
    for source in sources.find(dataset, split):
        for part in source.parts:
            for number, record in part.records():
                try:
                    prompt, answers, key = _read(formats.parsed(record))
                except formats.BadRecord as error:
                    raise InputError(f"{part.name}, {part.unit} {number}: {error}") from None
                if formats.percent_of(formats.content_hash(key)) in source.percents:
                    yield prompt, answers


def _read(record) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, answers, and the messages that decide the split."""
    name = formats.detect(record)
    if formats.is_pair(record) or formats.is_list(record):
        found = formats.comparison(record, name)
        return found.prompt, found.answers, found.prompt
    messages = formats.conversation(record, name).messages
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], [messages[last]], messages


class PreferenceRows(Sequence):
    """Rows of T tokens and at most A answers, by best fit of whole groups; made when they are asked for.

    Args:
      answers: the answers.
      length: T.
      room: A.

    Attributes:
      length, room: as given.
      answers: as given.
      reference: [n] float32, a reference model's log-probability of each answer: 0 until somebody sets it.

    Raises:
      InputError: the answers to one prompt do not fit into a row.
    """

    def __init__(self, answers: Answers, length: int, room: int):
        self.answers, self.length, self.room = answers, length, room
        self.reference = np.zeros(len(answers.values), np.float32)
        lengths = np.asarray(answers.documents.lengths)
        sizes = np.bincount(answers.groups)
        tokens = np.bincount(answers.groups, lengths).astype(np.int64)
        for what, found, limit in (("tokens", tokens, length), ("answers", sizes, room)):
            if found.max() > limit:
                raise InputError(
                    f"the answers to prompt {int(found.argmax())} have together {found.max()} {what}, a row has room "
                    f"for {limit}: all answers to a prompt stand in one row; make rows longer, or leave it out"
                )
        # An answer takes its share of the row whatever its length, so that no row has more answers than room.
        weights = np.maximum(tokens, -(-sizes * length // room))
        row_of = packing.best_fit(weights, length)
        self._order = np.argsort(row_of, kind="stable")
        self._bounds = np.searchsorted(row_of[self._order], np.arange(row_of.max() + 2))
        self._starts = np.cumsum(sizes) - sizes
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return int(np.sum(self.answers.documents.lengths)) / (len(self) * self.length)

    def members(self, index: int) -> np.ndarray:
        """Returns the numbers of the answers in a row, in order."""
        groups = self._order[self._bounds[index] : self._bounds[index + 1]]
        return np.concatenate([self._starts[group] + np.arange(self._sizes[group]) for group in groups])

    def __getitem__(self, index: int) -> PreferenceBatch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        members = self.members(index % len(self))
        documents = [self.answers.documents[place] for place in members.tolist()]
        row = packing.row(((ids, mask, len(ids)) for ids, mask in documents), self.length)
        ends, groups = np.zeros(self.room, np.int32), np.zeros(self.room, np.int32)
        values, reference = np.zeros(self.room, np.float32), np.zeros(self.room, np.float32)
        count = len(members)
        ends[:count] = np.cumsum([len(document.ids) for document in documents]) - 1
        groups[:count] = np.unique(self.answers.groups[members], return_inverse=True)[1] + 1
        values[:count], reference[:count] = self.answers.values[members], self.reference[members]
        return PreferenceBatch(*row, ends, groups, values, reference)
