"""In which order a kernel's grid takes pairs of blocks: what `ops.blockwise` loops over, as steps of a fixed grid.

A kernel writes one block of its output after another (the outer blocks) and for each runs over a range of blocks of the
other side (the inner ones), one range for each kind of query. A grid is a box, but ranges differ in length: under a
causal mask the last block of queries sees all keys and the first sees one block. So the grid takes outer blocks by
twos, the first with the last, the second with the last but one, …: together they have the same number of steps, and a
causal mask costs half a grid and not a whole one of which half is empty. What is over is bounded at run time by the
longest two.

Shapes: A kinds, B batch, O outer blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Walk(NamedTuple):
    """The ranges of inner blocks and the steps they take, int32 [A, B, O] known at run time; see `make`.

    Attributes:
      first, last: first inner block of each kind, and one past the last; none where last <= first.
      clear_first, clear_last: the inner blocks of which everybody may see everything: they need no mask.
      ends: steps that an outer block takes until it is done with a kind. Kinds go from the last one to kind 0, which
        for dual chunks is the order of the keys.
    """

    first: jax.Array
    last: jax.Array
    clear_first: jax.Array
    clear_last: jax.Array
    ends: jax.Array


class Place(NamedTuple):
    """Where one step stands; scalars.

    Attributes:
      outer, kind, inner: block of the output, kind of query, block of the other side.
      opens, closes: whether it is the first and the last step of its outer block.
      kind_opens, kind_closes: likewise of its kind in its outer block.
      masked, clear: whether there is an inner block that needs a mask, or one that needs none.
    """

    outer: jax.Array
    kind: jax.Array
    inner: jax.Array
    opens: jax.Array
    closes: jax.Array
    kind_opens: jax.Array
    kind_closes: jax.Array
    masked: jax.Array
    clear: jax.Array


def make(first, last, clear_first, clear_last, *, every_kind: bool) -> Walk:
    """Returns the walk over ranges of inner blocks.

    Args:
      first, last, clear_first, clear_last: of Walk.
      every_kind: each kind takes at least one step; else kind 0 does. A step without an inner block computes nothing
        and lets the kernel write zeros.
    """
    least_A11 = jnp.full((first.shape[0], 1, 1), int(every_kind), jnp.int32).at[0].set(1)
    ends = jax.lax.cumsum(jnp.maximum(last - first, least_A11), axis=0, reverse=True)
    return Walk(first, last, clear_first, clear_last, ends)


def grid(walk: Walk) -> tuple[int, jax.Array]:
    """Returns the number of twos of outer blocks, and that of steps the longest two needs, int32 of this run."""
    steps_BO = walk.ends[0]
    twos, odd = divmod(steps_BO.shape[1], 2)
    both_BO = steps_BO[:, :twos] + jnp.flip(steps_BO[:, twos + odd :], axis=1)
    return twos + odd, jnp.max(jnp.concatenate([both_BO, steps_BO[:, twos : twos + odd]], axis=1))


def locate(walk: Walk, b, two, step) -> Place:
    """Returns where a step stands. One beyond the end stays where the last one was: nothing is fetched for it.

    Args:
      walk: of arrays or of references to them.
      b, two, step: indices of the batch and of the grid.
    """
    kinds, _, blocks = walk.ends.shape
    mirror, before = blocks - 1 - two, walk.ends[0, b, two]
    second = (step >= before) & (mirror != two)
    outer, step = jnp.where(second, mirror, two), jnp.where(second, step - before, step)
    kind, start = jnp.int32(0), jnp.int32(0)
    for a in range(1, kinds):
        kind += (step < walk.ends[a, b, outer]).astype(jnp.int32)
    if kinds > 1:
        start = jnp.where(kind == kinds - 1, 0, walk.ends[jnp.minimum(kind + 1, kinds - 1), b, outer])
    first, last, clear_first, clear_last, end = (of[kind, b, outer] for of in walk)
    at = step - start
    inner = jnp.maximum(jnp.minimum(first + at, last - 1), 0)
    computes, clear = at < last - first, (inner >= clear_first) & (inner < clear_last)
    return Place(
        outer, kind, inner, step == 0, step == walk.ends[0, b, outer] - 1, step == start, step == end - 1,
        computes & ~clear, computes & clear,
    )  # fmt: skip
