"""Rows into batches: shuffled anew each epoch, shared out over processes, prefetched by threads, resumable exactly.

Which rows batch n holds is a function of (rows, seed, batch_size, n) and of nothing else: not of the number of
processes, of threads, nor of where a run was interrupted.
"""

from collections.abc import Sequence

import grain
import numpy as np

from qwen_jax.batches import LMBatch, PreferenceBatch
from qwen_jax.data.packing import MixedRows
from qwen_jax.errors import InputError

Row = LMBatch | PreferenceBatch


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Iterates over batches of rows.

    Each epoch goes over every row once, in a new order. With `repeat`, epochs follow each other without a gap: a batch
    may hold the end of one and the start of the next. Of MixedRows, each part has epochs of its own, and its share of
    all rows is by weight at any time. Without, there is one epoch, and the last batch is filled up with
    empty rows (all 0), so that shapes stay the same.

    The state, `iterator.get_state()`, is the dict `{"next_index": n}`, n an int: how many batches were taken. It is
    JSON as it stands, and holds on any number of processes that divides the batch. `iterator.set_state(state)` goes
    there without reading what lies before. Close an iterator that is given up early (`iterator.close()`).

    Args:
      rows: a random-access sequence of rows, LMBatch or PreferenceBatch, of arrays without B; read by several threads.
      batch_size: B, rows in a batch over all processes.
      seed: any non-negative integer; seeds near each other give unrelated orders.
      shuffle: if False, rows come in their own order, the same in each epoch.
      repeat: go on for ever.
      process_index, process_count: which share of each batch this process reads: rows
        [index * B / count, (index + 1) * B / count) of it, so that the shares laid end to end are the batch.
      threads: that read ahead.
      prefetch: batches kept ready.

    Returns:
      An iterator of batches of the rows' kind, numpy arrays [B / process_count, ...].

    Raises:
      InputError: no rows, or sizes that do not fit each other.
    """
    if not len(rows):
        raise InputError("there are no rows to make batches of")
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise InputError(f"batch_size {batch_size} cannot be shared evenly by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index {process_index} is not one of {process_count} processes (0 is the first)")
    numbers = _numbers(rows, seed if shuffle else None, repeat)
    share = batch_size // process_count
    reader = _Reader(rows, share * process_index, share * (process_index + 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(numbers.batch(batch_size).map(reader).to_iter_dataset(options))


def _numbers(rows: Sequence[Row], seed: int | None, repeat: bool) -> grain.MapDataset:
    """The order of the rows. Only their numbers go through grain, so that a process touches no row but its own."""
    parts = rows.parts if repeat and isinstance(rows, MixedRows) else [rows]
    orders, start = [], 0
    for place, part in enumerate(parts):
        order = grain.MapDataset.range(start, start + len(part))
        if seed is not None:
            order = order.shuffle(seed=order_seed(seed, place))
        orders.append(order.repeat() if repeat else order)
        start += len(part)
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=rows.weights)


def order_seed(seed: int, place: int) -> int:
    """Returns grain's seed for the order of part number `place`.

    grain takes seed + epoch as the seed of an epoch: without this, seed 1 would start with epoch 2 of seed 0.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(place,) if place else ()).generate_state(1)[0])


def evaluation(
    rows: Sequence[Row], *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """One pass over the rows in their own order; the last batch is filled up with empty rows. See `batches`."""
    return batches(
        rows,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        repeat=False,
        process_index=process_index,
        process_count=process_count,
    )


class _Reader:
    """Row numbers of a batch -> this process's share of it, stacked."""

    def __init__(self, rows: Sequence[Row], start: int, stop: int):
        self._rows, self._start, self._stop = rows, start, stop
        self._kind = type(rows[0])
        self._padding = self._kind(*map(np.zeros_like, rows[0]))  # segment 0, loss_mask 0, no answers

    def __call__(self, numbers: np.ndarray) -> Row:
        mine = [self._rows[i] for i in numbers[self._start : self._stop].tolist()]
        mine += [self._padding] * (self._stop - self._start - len(mine))
        return self._kind(*(np.stack(arrays) for arrays in zip(*mine, strict=True)))
