"""Documents of our own for the data tests, and rows taken apart."""

import numpy as np

from qwen_jax.data.conversations import Document


def documents(lengths, *, seed=0, vocab=1000):
    """Random documents of the given lengths; no id is 0, which is what padding holds."""
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(1, vocab, n, dtype=np.int32), rng.integers(0, 2, n).astype(bool)) for n in lengths]


def segments(row):
    """A row taken apart: (ids, targets, mask, positions) of each segment in order; what follows must be zeros."""
    used = int((row.segment_ids > 0).sum())
    for array in row:
        assert array.shape == row.tokens.shape
        assert not array[used:].any()
    parts = []
    for segment in range(1, int(row.segment_ids.max()) + 1):
        where = np.flatnonzero(row.segment_ids == segment)
        assert (np.diff(where) == 1).all() and len(where)
        parts.append(tuple(a[where] for a in (row.tokens, row.targets, row.loss_mask, row.positions)))
    assert sum(len(p[0]) for p in parts) == used
    return parts
