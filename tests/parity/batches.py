"""The batches parity is shown on: whole rows, padding on either side, several documents in a row."""

import numpy as np

KINDS = ("whole", "right-padded", "left-padded", "packed")


def batch(kind: str, vocab_size: int, rows: int = 3, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 tokens and segment ids (0 is padding), each [rows, length]."""
    tokens = np.random.default_rng(KINDS.index(kind)).integers(0, vocab_size, (rows, length), dtype=np.int32)
    segments = np.ones_like(tokens)
    for row in range(rows):
        if kind == "right-padded":
            segments[row, length - 2 * row :] = 0
        elif kind == "left-padded":
            segments[row, : 2 * row] = 0
        elif kind == "packed":
            first, second = 3 + row, 8
            segments[row] = [1] * first + [2] * (second - first) + [3] * (length - second - row) + [0] * row
    return tokens, segments


def scored(segments: np.ndarray) -> np.ndarray:
    """Returns [rows, length - 1] bool: where the next token is of the same document."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
