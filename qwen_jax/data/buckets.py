"""One document a row, in rows of few lengths: the alternative to packing, for what must not share a row.

A batch is of rows of one length, the shorter the more of them, so that every batch has the same number of places and
one program is compiled for each length. Which documents batch n holds is a function of (documents, seed, batch_size, n)
alone. Shapes: T row length.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from qwen_jax.batches import LMBatch
from qwen_jax.data import loader, packing
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError

SHORTEST = 32  # tokens in the shortest rows
MOST = 4  # lengths


class Padded(Sequence):
    """Rows of one document each, padded to T.

    Args:
      documents: a random-access sequence.
      places: which of them, each of at most T tokens.
      length: T.
    """

    def __init__(self, documents: Sequence[Document], places: np.ndarray, length: int):
        self._documents, self._places, self.length = documents, places, length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> LMBatch:
        ids, mask = self._documents[int(self._places[index])]
        return packing.row([(ids, mask, len(ids))], self.length)


class BucketRows:
    """The rows of all sources, by source and length.

    Args:
      sources: documents of each source, of at most `length` tokens, with `lengths`.
      length: tokens in the longest rows; the others have a half, a fourth, an eighth of it, at least SHORTEST.
      weights: of the sources in every batch's draw; their sizes if None.

    Attributes:
      length: as given.
      parts: rows of one source and length.
      weights: of the parts, in numbers of batches.
      tokens: how many tokens the documents hold together.

    Raises:
      InputError: a document is longer than the longest row.
    """

    def __init__(self, sources: Sequence[Sequence[Document]], length: int, weights: Sequence[float] | None = None):
        self.length, self.parts, self.weights, self.tokens = length, [], [], 0
        for place, documents in enumerate(sources):
            if documents.lengths.max(initial=0) > length:
                raise InputError(
                    f"a document has {documents.lengths.max()} tokens, the longest row holds {length}: truncate, split "
                    "or drop the long ones (too_long=), or make rows longer"
                )
            parts = list(_parts(documents, length))
            places = sum(len(part) * part.length for part in parts)
            share = places if weights is None else weights[place]
            self.parts += parts
            self.weights += [share * len(part) * part.length / places for part in parts]
            self.tokens += int(documents.lengths.sum())

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[LMBatch]:
        return itertools.chain.from_iterable(self.parts)

    @property
    def lengths(self) -> list[int]:
        """The lengths that there are rows of, the longest first."""
        return sorted({part.length for part in self.parts}, reverse=True)

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.tokens / sum(len(part) * part.length for part in self.parts)


def _parts(documents: Sequence[Document], length: int) -> Iterator[Padded]:
    """Yields the rows of each length, every document in the shortest that holds it."""
    lengths = [length]
    while len(lengths) < MOST and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    for longest, shorter in zip(lengths, [*lengths[1:], 0], strict=True):
        places = np.flatnonzero((documents.lengths > shorter) & (documents.lengths <= longest))
        if len(places):
            yield Padded(documents, places, longest)


def batches(
    rows: BucketRows, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterates over batches for ever: [batch_size, length], or twice as many rows of half the length, and so on.

    Every part has epochs of its own, in a new order each; over the parts batches are drawn so that their shares are by
    weight at any time. State, shares of processes and reading ahead are those of `loader.batches`.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size {batch_size} cannot be shared evenly by {process_count} processes")
    orders = []
    for place, part in enumerate(rows.parts):
        count = batch_size * (rows.length // part.length)
        order = grain.MapDataset.range(len(part)).shuffle(seed=loader.order_seed(seed, place)).repeat().batch(count)
        share = count // process_count
        orders.append(
            order.map(functools.partial(_read, part, slice(share * process_index, share * (process_index + 1))))
        )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.mix(orders, weights=rows.weights).to_iter_dataset(options))


def _read(part: Padded, mine: slice, numbers: np.ndarray) -> LMBatch:
    return LMBatch(*(np.stack(arrays) for arrays in zip(*(part[i] for i in numbers[mine].tolist()), strict=True)))
