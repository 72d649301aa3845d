"""Prompts out of held-out rows: what a model is asked while it trains, and what the data answers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.batches import LMBatch

TEXT_PROMPT = 16  # tokens of a plain text that are given, at most half of it


class Prompt(NamedTuple):
    """A document of a held-out row, cut where the model is to go on.

    Attributes:
      ids: what the model reads.
      answer: what the data has there.
      domain: of the document.
    """

    ids: list[int]
    answer: list[int]
    domain: str


def from_rows(rows: Mapping[str, Sequence[LMBatch]], count: int, *, longest: int) -> list[Prompt]:
    """Takes documents in turn from each domain, in the order of its rows.

    A chat is cut before its longest stretch of learned tokens, which is an answer under every loss mask; a text, all
    of which is learned, after its first TEXT_PROMPT tokens.

    Args:
      rows: domain -> rows.
      count: at most so many prompts.
      longest: documents that are cut after more than so many tokens are passed over.
    """

    def of(domain: str) -> Iterator[Prompt]:
        cut = (both for row in rows[domain] for both in _documents(row))
        return (Prompt(ids, answer, domain) for ids, answer in cut if len(ids) <= longest)

    streams = map(of, rows)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    return list(itertools.islice((prompt for prompt in in_turn if prompt is not None), count))


def _documents(row: LMBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (prompt, answer) of the documents of a row that have both."""
    for segment in range(1, int(row.segment_ids.max(initial=0)) + 1):
        mine = row.segment_ids == segment
        ids = row.tokens[mine]
        learned = np.concatenate([[False], row.loss_mask[mine][:-1] > 0])  # a target is the token after its place
        if len(ids) > 1 and learned[1:].all():
            start, stop = min(TEXT_PROMPT, len(ids) // 2), len(ids)
        else:
            start, stop = _longest_run(learned)
        if 0 < start < stop:
            yield ids[:start].tolist(), ids[start:stop].tolist()


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Returns where the longest run of True starts and stops, the first of several; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    place = int(np.argmax(stops - starts))
    return int(starts[place]), int(stops[place])
