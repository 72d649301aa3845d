"""A box of a parameter is the same part of its tensor whichever way it is cut, and a whole one goes back unchanged."""

import itertools

import numpy as np
import pytest

from qwen_jax.hf import boxes, layouts

SIZES = dict(J=1, V=10, D=6, N=4, K=2, H=8, F=70, P=3)
ENTRIES = {f"{kind}:{e.path}": e for kind in ("qwen2", "qwen") for e in layouts.TABLES[kind]}
AXES = {e.axes + str(e.part): e for e in ENTRIES.values()}  # each way of turning once


def pieces(size, parts):
    return [range(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


@pytest.mark.parametrize("entry", AXES.values(), ids=AXES)
def test_parts_are_parts_of_the_whole(entry):
    shape = [np.prod([SIZES[x] for x in group]) for group in entry.groups]
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def read(box):
        found = boxes.cut(entry, SIZES, box)
        part = tensor[found.slices]
        return boxes.to_ours(entry, found, part), part.size

    sizes = [SIZES[letter] for letter in entry.ours]
    whole, size = read([range(size) for size in sizes])
    assert size == whole.size == len(np.unique(whole))
    for parts in itertools.product((1, 2), repeat=len(sizes)):
        for box in itertools.product(*(pieces(size, n) for size, n in zip(sizes, parts, strict=True))):
            np.testing.assert_array_equal(read(box)[0], whole[np.ix_(*box)])
    if entry.part is None:
        np.testing.assert_array_equal(boxes.to_file(entry, tuple(shape), whole), tensor)
