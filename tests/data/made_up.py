"""Small material of our own for the data tests: a tokenizer stand-in, chats, documents, checks on rows."""

import numpy as np

from qwen_jax.data.conversations import Document

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
VOCAB = 259


class ByteTokenizer:
    """One id per byte; special tokens are never made from text."""

    special_tokens = SPECIAL
    vocab_size = VOCAB

    def encode(self, text, *, allowed_special=frozenset()):
        return list(text.encode())


def documents(lengths, *, seed=0, vocab=1000):
    """Random documents of the given lengths."""
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, vocab, n, dtype=np.int32), rng.integers(0, 2, n).astype(bool)) for n in lengths]


def segments(row):
    """A row taken apart: (ids, targets, mask, positions) of each segment, in order; padding must be zeros at the end."""
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
