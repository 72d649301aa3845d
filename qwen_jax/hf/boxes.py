"""One layer's (and expert's) part of a parameter, cut out of a file tensor and turned to our axes, and back.

A device needs a box of a parameter: a range of each of our axes. `cut` says which rows and columns of the file hold it.
"""

import math
from typing import NamedTuple

import numpy as np

from qwen_jax.hf.layouts import Entry


class Cut(NamedTuple):
    """How a box is read.

    Attributes:
      slices: of the file's tensor, one range an axis: all that is read from the disk.
      letters: axes of what was read, once each file axis is unfolded into its letters.
      shape: sizes of those axes.
      inner: what of them to keep (everything, unless a mesh splits a letter that is not the outermost of its axis).
    """

    slices: tuple[slice, ...]
    letters: str
    shape: tuple[int, ...]
    inner: tuple[slice, ...]


def cut(entry: Entry, sizes: dict[str, int], box: tuple[range, ...]) -> Cut:
    """Finds a box in the file.

    Args:
      entry: the parameter's row in the table.
      sizes: of each letter.
      box: the wanted range of each of our axes, without the leading ones.
    """
    wanted = dict(zip(entry.ours, box, strict=True))
    if entry.part is not None:
        wanted["P"] = range(entry.part, entry.part + 1)
    slices, shape, inner = [], [], []
    for group in entry.groups:
        start, stop, narrow = 0, 1, True  # narrow: the letters so far pick one run of the file's axis
        for place, letter in enumerate(group):
            stride = math.prod(sizes[rest] for rest in group[place + 1 :])
            if narrow:
                start += wanted[letter].start * stride
                stop = start + len(wanted[letter]) * stride
                shape.append(len(wanted[letter]))
                inner.append(slice(None))
                narrow = len(wanted[letter]) == 1
            else:
                shape.append(sizes[letter])
                inner.append(slice(wanted[letter].start, wanted[letter].stop))
        slices.append(slice(start, stop))
    return Cut(tuple(slices), "".join(entry.groups), tuple(shape), tuple(inner))


def to_ours(entry: Entry, found: Cut, read: np.ndarray) -> np.ndarray:
    """Turns what `found.slices` read into the box, as a view where numpy can."""
    box = read.reshape(found.shape)[found.inner]
    order = [found.letters.index(letter) for letter in entry.ours]
    if entry.part is not None:
        packed = found.letters.index("P")
        box = box.squeeze(packed)
        order = [axis - (axis > packed) for axis in order]
    return box.transpose(order)


def to_file(entry: Entry, shape: tuple[int, ...], ours: np.ndarray) -> np.ndarray:
    """Turns a whole parameter of one layer into the file's tensor of this shape; only for rows without a part."""
    order = [entry.ours.index(letter) for group in entry.groups for letter in group]
    return np.ascontiguousarray(ours.transpose(order).reshape(shape))
