"""Records -> token ids, in parallel processes, with an account of every record that could not be used.

Only here are many processes at work; they load no JAX. What they make comes back in the order of the records.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.data import conversations, formats
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, chat

AUTO = "auto"
SHOWN = 20  # bad records that are kept word for word; the rest is counted
_BLOCK = 256  # records at a time
_FEW = 16  # blocks that are not worth starting processes for


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How records become documents.

    Attributes:
      generation: whose chat format, as in `tokenizer.chat.render`.
      loss: which tokens are learned, as there.
      max_length: the most tokens of a document; None is no limit.
      too_long: what becomes of a longer one, as in `conversations.chat_documents` or `answer_documents`.
      format: one of `formats.NAMES`, or "auto": that of the file's first record that has one.
      pairs: the records are pairs or lists of answers (`formats.comparison`); loss is of no matter then.
    """

    generation: str = "qwen2"
    loss: str = "assistant"
    max_length: int | None = None
    too_long: str = "error"
    format: str = AUTO
    pairs: bool = False

    def __post_init__(self):
        if self.format not in (AUTO, *formats.NAMES):
            raise InputError(f"format is {self.format!r}; expected one of {', '.join((AUTO, *formats.NAMES))}")


class Block(NamedTuple):
    """Records of one part that follow each other: (number, record) each, in a format if that is known."""

    part: int
    format: str | None
    records: list[tuple[int, Any]]


class Piece(NamedTuple):
    """What was made of a block. n documents of m tokens together.

    Attributes:
      part: which part the block is of.
      format: in which format the records are; None while none was recognised.
      arrays: ids [m] int32, loss_mask [m] bool, lengths [n] int64, percents [n] uint8; of answers that are compared
        also values [n] float32 and compared [n] int32, how many answers their prompt has; else NaN and 1.
      domains: names that the array domains [n] uint16 numbers, in the order in which they came up.
      counts: of records, and of what was cut or left out.
      bad: of bad records by kind.
      shown: (number, message) of some of them.
    """

    part: int
    format: str | None
    arrays: dict[str, np.ndarray]
    domains: list[str]
    counts: dict[str, int]
    bad: dict[str, int]
    shown: list[tuple[int, str]]


def check(tok: Tokenizer, rendering: Rendering) -> None:
    """Holds a rendering to what can be done, before any record is read: what fails later is a record's fault.

    Raises:
      InputError: on an unknown field's value, or a tokenizer without the control tokens of a chat.
    """
    limits = dict(generation=rendering.generation, max_length=rendering.max_length, too_long=rendering.too_long)
    if rendering.pairs:
        conversations.answer_documents([], tok, **limits)
    else:
        conversations.chat_documents([], tok, **limits)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.render(said, tok, generation=rendering.generation, loss=rendering.loss)


def blocks(part: int, records: Iterable[tuple[int, Any]], format: str) -> Iterator[Block]:
    """Cuts the records of a part into blocks, and looks at the first for their format."""
    known = None if format == AUTO else format
    records = iter(records)
    while some := list(itertools.islice(records, _BLOCK)):
        known = known or _first_format(some)
        yield Block(part, known, some)


def _first_format(records: list[tuple[int, Any]]) -> str | None:
    for _, record in records:
        with contextlib.suppress(formats.BadRecord):
            return formats.detect(formats.parsed(record))
    return None


def tokenise(
    blocks: Iterator[Block], tok: Tokenizer, rendering: Rendering, *, workers: int | None = None
) -> Iterator[Piece]:
    """Makes a piece of each block, in order.

    Args:
      blocks: read as they are needed, so that they may be more than memory holds.
      tok: the tokenizer.
      rendering: how.
      workers: processes; as many as there are cores by default. With 1, or few blocks, all is done in this one.

    Raises:
      InputError: a process was killed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    first = list(itertools.islice(blocks, _FEW))
    if len(first) < _FEW or workers == 1:
        yield from (piece(block, tok, rendering) for block in itertools.chain(first, blocks))
        return
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork of this process could hang on a lock of JAX's threads
        _start,
        (tok, rendering),
    )
    try:
        for block in itertools.chain(first, blocks):
            with _empty_program():
                waiting.append(pool.submit(_piece, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise InputError("a process that tokenises was killed: is there too little memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _empty_program():
    """Keeps a process started meanwhile from importing the program that runs here, an experiment, and with it JAX."""
    program, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


_given: list = []


def _start(tok: Tokenizer, rendering: Rendering) -> None:
    _given[:] = tok, rendering


def _piece(block: Block) -> Piece:
    return piece(block, *_given)


def piece(block: Block, tok: Tokenizer, rendering: Rendering) -> Piece:
    """Tokenises one block; a record that cannot be used is counted and told, and nothing is raised."""
    counts, bad, shown = collections.Counter(records=len(block.records)), collections.Counter(), []
    documents, percents, values, compared = [], [], [], []
    domains, domain_of = {}, []
    for number, record in block.records:
        try:
            made, percent, worth = _made(record, block.format, tok, rendering)
        except formats.BadRecord as error:
            bad[error.kind] += 1
            if len(shown) < SHOWN:
                shown.append((number, str(error)))
            continue
        counts.update({name: count for name, count in made._asdict().items() if name != "documents" and count})
        documents += made.documents
        domain_of += [domains.setdefault(formats.domain(formats.parsed(record)), len(domains))] * len(made.documents)
        percents += [percent] * len(made.documents)
        if made.documents:
            values += worth or [np.nan] * len(made.documents)
            compared += [len(worth) or 1] * len(made.documents)
    arrays = {
        "ids": _joined([document.ids for document in documents], np.int32),
        "loss_mask": _joined([document.loss_mask for document in documents], bool),
        "lengths": np.array([len(document.ids) for document in documents], np.int64),
        "percents": np.array(percents, np.uint8),
        "values": np.array(values, np.float32),
        "compared": np.array(compared, np.int32),
        "domains": np.array(domain_of, np.uint16),
    }
    return Piece(block.part, block.format, arrays, list(domains), dict(counts), dict(bad), shown)


def _made(record: Any, format: str | None, tok: Tokenizer, rendering: Rendering):
    """A record's documents, its hash class, and what people think of each if they are answers to one prompt."""
    record = formats.parsed(record)
    format = format or formats.detect(record)
    limits = dict(generation=rendering.generation, max_length=rendering.max_length, too_long=rendering.too_long)
    try:
        if rendering.pairs:
            comparison = formats.comparison(record, format)
            said, worth = comparison.prompt, comparison.values  # all answers to one prompt belong to one split
            made = conversations.answer_documents([comparison], tok, **limits)
        else:
            conversation = formats.conversation(record, format)
            said, worth = conversation.messages, []
            made = conversations.chat_documents([conversation], tok, loss=rendering.loss, **limits)
    except InputError as error:
        detail = str(error).removeprefix("pair 0").removeprefix("conversation 0").lstrip(": ")
        kind = "too long" if isinstance(error, conversations.LongerThanLimit) else "not renderable"
        raise formats.BadRecord(kind, detail) from None
    return made, formats.percent_of(formats.content_hash(said)), worth


def _joined(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
