"""Documents into rows of a fixed length, without wasting tokens and without one document seeing another.

`PackedRows` fits whole documents side by side (fine-tuning: a conversation is never cut); `StreamRows` lays the
shuffled documents end to end and cuts every T tokens (pretraining: no padding but in the last row). Both are sequences
of `LMBatch` rows, made when they are asked for; what is held is a few integers per document.

In both, the target of a position is the next token of the same document, its loss_mask is that token's mask, and a
document's last token has no target. Shapes: T row length.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qwen_jax.batches import LMBatch
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError


class Joined(Sequence):
    """Sequences laid end to end."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int):
        index = _checked(index, len(self))
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[place][index - int(self._ends[place])]  # counted from the end of the part


class _Rows(Sequence):
    length: int
    tokens: int

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.tokens / (len(self) * self.length)

    def first(self, count: int) -> list[LMBatch]:
        """Returns the first rows, or all where there are fewer."""
        return [self[index] for index in range(min(count, len(self)))]


class PackedRows(_Rows):
    """Rows of whole documents, by best fit: each document, longest first, goes where the least room is left over.

    The result depends on the documents' lengths and order alone. A document of no tokens takes no place.

    Args:
      documents: a random-access sequence of documents, each of at most `length` tokens.
      length: T, tokens per row.

    Attributes:
      length: T.
      tokens: how many tokens the documents hold together.

    Raises:
      InputError: a document is longer than a row, or there are no tokens at all.
    """

    def __init__(self, documents: Sequence[Document], length: int):
        lengths = _lengths(documents, length)
        if lengths.max() > length:
            worst = int(lengths.argmax())
            raise InputError(
                f"document {worst} has {lengths[worst]} tokens, a packed row holds {length}: "
                f"truncate or drop the long ones (too_long=), or make rows longer"
            )
        self.length, self.tokens = length, int(lengths.sum())
        self._documents = documents
        row_of = best_fit(lengths, length)
        self._order = np.argsort(row_of, kind="stable")[np.count_nonzero(row_of < 0) :]
        self._bounds = np.searchsorted(row_of[self._order], np.arange(row_of.max() + 2))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> LMBatch:
        index = _checked(index, len(self))
        members = self._order[self._bounds[index] : self._bounds[index + 1]]
        documents = (self._documents[i] for i in members.tolist())
        return row(((ids, mask, len(ids)) for ids, mask in documents), self.length)


class StreamRows(_Rows):
    """Rows cut from one stream of all documents, in an order shuffled by a seed.

    A document that crosses a cut goes on in the next row as a segment of its own, positions from 0. The last token
    before a cut keeps its target, the first token after it: no target is lost.

    Args:
      documents: a random-access sequence of documents of any length.
      length: T, tokens per row.
      seed: of the documents' order.

    Attributes:
      length: T.
      tokens: how many tokens the documents hold together.

    Raises:
      InputError: there are no tokens at all.
    """

    def __init__(self, documents: Sequence[Document], length: int, *, seed: int):
        lengths = _lengths(documents, length)
        self.length, self.tokens = length, int(lengths.sum())
        self._documents = documents
        self._order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths))
        self._ends = np.cumsum(lengths[self._order])

    def __len__(self) -> int:
        return -(-self.tokens // self.length)

    def __getitem__(self, index: int) -> LMBatch:
        start = _checked(index, len(self)) * self.length
        return row(self._pieces(start, min(start + self.length, self.tokens)), self.length)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """The parts of documents in [start, stop) of the stream."""
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            ids, mask = self._documents[int(self._order[place])]
            offset = start - (int(self._ends[place]) - len(ids))
            count = min(len(ids) - offset, stop - start)
            yield ids[offset:], mask[offset:], count
            start += count
            place += 1


class MixedRows(Joined, _Rows):
    """Rows of several sources, which `loader.batches` draws by weight; in their own order, those of each in turn.

    Args:
      parts: rows of each source, of one length.
      weights: [parts] above 0; their proportions are what counts.

    Attributes:
      parts, weights: as given.
      length: T.
      tokens: how many tokens the rows hold together.
    """

    def __init__(self, parts: Sequence[_Rows], weights: Sequence[float]):
        super().__init__(parts)
        self.weights = tuple(weights)
        self.length, self.tokens = parts[0].length, sum(part.tokens for part in parts)

    def first(self, count: int) -> list[LMBatch]:
        """Returns the first rows of each part, in the proportions of the weights; all where there are fewer."""
        found = first_of_each(dict(enumerate(self.parts)), count, self.weights)
        return [row for some in found.values() for row in some]


def first_of_each(
    parts: Mapping[str, _Rows], count: int, weights: Sequence[float] | None = None
) -> dict[str, list[LMBatch]]:
    """Returns the first rows of each part, `count` in all, about, and at least one of each; all where there are fewer.

    Args:
      parts: name -> rows.
      count: of rows.
      weights: what they are shared out by; the parts' sizes if None.
    """
    weights = weights or [len(part) for part in parts.values()]
    shares = [round(count * weight / sum(weights)) for weight in weights]
    return {name: part.first(max(1, share)) for (name, part), share in zip(parts.items(), shares, strict=True)}


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing.

    Args:
      lengths: [n] integers in 0..capacity.
      capacity: what a bin holds.

    Returns:
      [n] int64, the bin of each item, numbered from 0; -1 for items of length 0.
    """
    bins = np.full(len(lengths), -1, np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r is set when a bin with room r is open: the best fit is then one shift and one lowest bit
    made = 0
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    for item, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, made
            made += 1
        bins[item] = chosen
        if room > size:
            open_bins[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


def row(pieces: Iterable[tuple[np.ndarray, np.ndarray, int]], length: int) -> LMBatch:
    """Lays pieces (ids, mask, count) side by side: `count` tokens each, and what follows them as the last's target."""
    row = LMBatch(*(np.zeros(length, np.float32 if name == "loss_mask" else np.int32) for name in LMBatch._fields))
    start = 0
    for segment, (ids, mask, count) in enumerate(pieces, 1):
        stop, following = start + count, min(count, len(ids) - 1)
        row.tokens[start:stop] = ids[:count]
        row.targets[start : start + following] = ids[1 : following + 1]
        row.loss_mask[start : start + following] = mask[1 : following + 1]
        row.segment_ids[start:stop] = segment
        row.positions[start:stop] = np.arange(count)
        start = stop
    return row


def _lengths(documents: Sequence[Document], length: int) -> np.ndarray:
    if length < 1:
        raise InputError(f"a row has {length} tokens; it needs at least 1")
    lengths = getattr(documents, "lengths", None)  # what is stored need not be read to be measured
    if lengths is None:
        lengths = np.fromiter((len(document.ids) for document in documents), np.int64, len(documents))
    if not lengths.sum():
        raise InputError(f"there is nothing to pack: {len(lengths)} documents hold no tokens")
    return lengths


def _checked(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"row {index} of {count}")
    return index % count
