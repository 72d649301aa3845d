"""Which pairs of blocks of queries and keys attention has to compute: decided at run time, from positions and segments.

From the least and greatest (segment, position) of every block follows the range of key blocks that a query block can
see, and from its extremes the part of that range of which it sees everything, so that nothing needs a mask there. On
ordinary rows the upper triangle, padding, other documents of a packed row and the unwritten slots of a cache are
outside; on any other input the exact mask inside a block still decides. `ops.blockwise` loops over these ranges, and
`ops.kernels` makes grids of them.

Queries come in A kinds that share one softmax: one in plain attention, three in dual chunk attention, each with its
own window of key positions (`ops.dual_chunk`). A pair of blocks that no border of a chunk cuts is of one kind only, so
three kinds cost what one costs; where a border cuts, the exact mask decides.

Shapes: A kinds of queries, B batch, T queries, S keys; I query blocks of P positions, J key blocks of C positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.ops import dual_chunk

INT32 = jnp.iinfo(jnp.int32)


class Spec(NamedTuple):
    """What is known before tracing.

    Attributes:
      scale: of the logits.
      causal: whether later keys are hidden.
      block_q, block_k: positions per query block and key block.
      stride: of dual chunk attention, which is causal; None is plain attention.
    """

    scale: float
    causal: bool
    block_q: int
    block_k: int
    stride: int | None = None


class Marks(NamedTuple):
    """Who may see whom: positions and segment ids as `ops.attention.attention` takes them, int32."""

    q_positions_BT: jax.Array
    kv_positions_BS: jax.Array
    q_segment_ids_BT: jax.Array
    kv_segment_ids_BS: jax.Array


class Blocks(NamedTuple):
    """Positions and segment ids cut into blocks; of queries of several kinds, with an axis of kinds in front.

    The last block is shifted back to end with the array instead of being padded; what it repeats of the block before
    is `stale` and has segment id 0, so it is neither computed twice nor counted twice.

    Attributes:
      starts: [I] int32, index of the first position of each block.
      positions, segment_ids: [I, B, P] int32; the position of a query is the greatest that it sees.
      stale: [I, P] bool.
      since: [I, B, P] int32, the least position that a query sees; None is no bound.
    """

    starts: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    stale: jax.Array
    since: jax.Array | None = None


def block_size(length: int, most: int) -> int:
    """Returns the size that cuts `length` into the fewest blocks of at most `most`, all about equally full.

    A multiple of 8 where more than one block is needed: vector registers.
    """
    count = -(-length // most)
    return length if count == 1 else min(most, -(-length // (8 * count)) * 8)


def cut(positions_BT, segment_ids_BT, size: int, since_BT=None) -> Blocks:
    """Cuts positions and segment ids of one side into blocks of `size`, at most T."""
    B, T = positions_BT.shape
    wanted_I = jnp.arange(-(-T // size), dtype=jnp.int32) * size
    starts_I = jnp.minimum(wanted_I, T - size)
    stale_IP = starts_I[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :] < wanted_I[:, None]

    def blocks(x_BT):
        x_BT = jnp.concatenate([x_BT[:, : (T - 1) // size * size], x_BT[:, T - size :]], axis=1)
        return jnp.swapaxes(x_BT.reshape(B, -1, size), 0, 1)

    segment_ids_IBP = jnp.where(stale_IP[:, None], 0, blocks(segment_ids_BT))
    since_IBP = None if since_BT is None else blocks(since_BT)
    return Blocks(starts_I, blocks(positions_BT), segment_ids_IBP, stale_IP, since_IBP)


def seen(queries: Blocks, keys: Blocks, causal: bool):
    """Returns [I, J, B] bool: False only where no query of the one block may see any key of the other.

    If a query sees a key, then the key's (segment, position) is not greater, in lexicographic order, than the query's.
    So a block of keys whose least pair is greater than a block of queries' greatest pair is invisible to all of it,
    and so is one whose range of segments lies apart. The same holds the other way round of (segment, since).
    """
    (q_low_IB, _), (q_high_IB, q_latest_IB) = _least(queries), _greatest(queries)
    (k_low_JB, k_earliest_JB), (k_high_JB, k_latest_JB) = _least(keys), _greatest(keys)
    q_low_I1B, q_high_I1B, q_latest_I1B = (x[:, None] for x in (q_low_IB, q_high_IB, q_latest_IB))
    k_low_1JB, k_earliest_1JB, k_high_1JB = (x[None] for x in (k_low_JB, k_earliest_JB, k_high_JB))
    seen_IJB = (k_low_1JB <= q_high_I1B) & (q_low_I1B <= k_high_1JB)
    if causal:
        seen_IJB &= (k_low_1JB < q_high_I1B) | (k_earliest_1JB <= q_latest_I1B)
    if queries.since is not None:
        since_I1B = _least(queries._replace(positions=queries.since))[1][:, None]
        seen_IJB &= (q_low_I1B < k_high_1JB) | (since_I1B <= k_latest_JB[None])
    return seen_IJB


def clear(queries: Blocks, keys: Blocks, causal: bool):
    """Returns [I, J, B] bool: True only where every query of the one block may see every key of the other."""
    q_low_IB, k_low_JB = (x.segment_ids.min(axis=-1) for x in (queries, keys))
    q_high_IB, k_high_JB = (x.segment_ids.max(axis=-1) for x in (queries, keys))
    one_I1B, one_1JB = ((q_low_IB == q_high_IB) & (q_low_IB != 0))[:, None], (k_low_JB == k_high_JB)[None]
    clear_IJB = one_I1B & one_1JB & (q_low_IB[:, None] == k_low_JB[None])
    if causal:
        clear_IJB &= keys.positions.max(axis=-1)[None] <= queries.positions.min(axis=-1)[:, None]
    if queries.since is not None:
        clear_IJB &= keys.positions.min(axis=-1)[None] >= queries.since.max(axis=-1)[:, None]
    return clear_IJB


class Ranges(NamedTuple):
    """Of each kind of each query block, int32 [A, I]: which key blocks any row of the batch needs, first and one past
    the last, and among them a run of blocks of which all rows see everything, likewise."""

    first_AI: jax.Array
    last_AI: jax.Array
    first_clear_AI: jax.Array
    last_clear_AI: jax.Array

    def clear(self, a, i, j):
        """Whether key block j needs no mask before query block i of kind a."""
        return (j >= self.first_clear_AI[a, i]) & (j < self.last_clear_AI[a, i])


def ranges(queries: Blocks, keys: Blocks, spec: Spec) -> Ranges:
    """Returns the ranges of the blocks of `cut_both`."""
    seen_AIJB, clear_AIJB = (by_pairs(of_pair, queries, keys, spec) for of_pair in (seen, clear))
    return Ranges(*bounds(seen_AIJB, axis=(2, 3)), *first_run(clear_AIJB.all(axis=-1), axis=2))


def by_pairs(of_pair, queries: Blocks, keys: Blocks, spec: Spec):
    """Returns [A, I, J, B] bool: `seen` or `clear` of every kind of the blocks of `cut_both`."""
    return jax.vmap(lambda queries: of_pair(queries, keys, spec.causal))(queries)


def bounds(seen_IJB, axis: int | tuple[int, int]):
    """Returns the index along `axis` (the first of them) of the first True, and of the last one plus 1; int32.

    Without any True the range is empty: (size, 0).
    """
    along = axis if isinstance(axis, int) else axis[0]
    index = jax.lax.broadcasted_iota(jnp.int32, seen_IJB.shape, along)
    size = seen_IJB.shape[along]
    return jnp.where(seen_IJB, index, size).min(axis=axis), jnp.where(seen_IJB, index + 1, 0).max(axis=axis)


def first_run(clear_IJB, axis: int):
    """Returns the index along `axis` of the first True and of the next False, int32; (size, size) without any True."""
    index, size = jax.lax.broadcasted_iota(jnp.int32, clear_IJB.shape, axis), clear_IJB.shape[axis]
    first = jnp.where(clear_IJB, index, size).min(axis=axis, keepdims=True)
    after = jnp.where(~clear_IJB & (index > first), index, size).min(axis=axis)
    return first.squeeze(axis), after


def cut_both(marks: Marks, spec: Spec) -> tuple[Blocks, Blocks]:
    """Cuts both sides; the queries' blocks have an axis of kinds in front."""
    keys = cut(marks.kv_positions_BS, marks.kv_segment_ids_BS, spec.block_k)
    segment_ids_BT = marks.q_segment_ids_BT
    if spec.stride is None:
        windows = marks.q_positions_BT[None], segment_ids_BT[None], None
    else:
        since_ABT, until_ABT = dual_chunk.windows(marks.q_positions_BT, spec.stride)
        # A window that ends before any key is told as padding, so that a first chunk costs nothing for earlier ones,
        # whatever documents its block holds.
        empty_ABT = until_ABT < jnp.min(marks.kv_positions_BS, initial=INT32.max)
        windows = until_ABT, jnp.where(empty_ABT, 0, segment_ids_BT[None]), since_ABT
    return jax.vmap(lambda positions, ids, since: cut(positions, ids, spec.block_q, since))(*windows), keys


def _least(blocks: Blocks):
    """Returns the least segment id of each block but for padding, and the least position in it; int32 [I, B] each."""
    segments = jnp.where(blocks.segment_ids == 0, INT32.max, blocks.segment_ids)
    least = segments.min(axis=-1, keepdims=True)
    return least[..., 0], jnp.where(segments == least, blocks.positions, INT32.max).min(axis=-1)


def _greatest(blocks: Blocks):
    """Returns the greatest segment id of each block but for padding, and the greatest position in it."""
    segments = jnp.where(blocks.segment_ids == 0, INT32.min, blocks.segment_ids)
    greatest = segments.max(axis=-1, keepdims=True)
    return greatest[..., 0], jnp.where(segments == greatest, blocks.positions, INT32.min).max(axis=-1)
