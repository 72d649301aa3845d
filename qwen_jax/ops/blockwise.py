"""Blockwise attention: a softmax taken one block of keys at a time, so that no T x S array ever exists.

Forward: the online softmax of Milakov & Gimelshein (arXiv:1805.02867) as used by FlashAttention-2 (arXiv:2307.08691,
algorithm 1). Backward: its algorithm 2, with query blocks outside, keys' gradients accumulated in place.

Which blocks are computed is decided at run time: from the least and greatest (segment, position) of every block follows
the range of key blocks that a query block can see; the inner loop runs over that range only. On ordinary rows the
upper triangle, padding, other documents of a packed row and the unwritten slots of a cache cost nothing; on any other
input the exact mask inside a block still decides.

Queries come in A kinds that share one softmax: one in plain attention, three in dual chunk attention, each with its
own window of key positions (`ops.dual_chunk`). A pair of blocks that no border of a chunk cuts is of one kind only, so
three kinds cost what one costs; where a border cuts, the exact mask decides.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim; I query blocks
of P positions, J key blocks of C positions; R = G*P, the rows of a query block that share a kv head (folded, so that
every product is a plain batched matrix product: no keys are repeated).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.ops import dual_chunk

NEG_INF = -1e30  # finite, so that a row without any key gives zeros and not NaN
FLOOR = 0.1 * NEG_INF  # running peaks start here: above a masked logit, whose exponential is then 0, below any other
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


def forward(q_BTNH, k_BSKH, v_BSKH, marks: Marks, spec: Spec):
    """Returns out_BTNH and logsumexp_BTN under the contract of `ops.attention.attention`; memory linear in T and S.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries ([A, B, T, N, H] with a stride), keys and values; K divides N.
      marks: positions and segment ids, any values.
      spec: block_q at most T, block_k at most S.
    """
    q_ABTNH = by_kind(q_BTNH, spec)
    A, B, T, N, H = q_ABTNH.shape
    K, P, G = k_BSKH.shape[2], spec.block_q, N // k_BSKH.shape[2]
    queries, keys = cut_both(marks, spec)
    first_AI, last_AI = _ranges(queries, keys, spec)

    def query_block(i, outputs):
        def kind(a, state):
            rows = _at(queries, (a, i))
            q_BKRH = _rows(q_ABTNH, a, rows.starts, P, K)

            def key_block(j, state):
                acc_BKRH, total_BKR1, peak_BKR1 = state
                cols = _at(keys, j)
                logits_BKRC = _logits(q_BKRH, _keys(k_BSKH, cols.starts, spec), rows, cols, spec)
                new_BKR1 = jnp.maximum(peak_BKR1, jnp.max(logits_BKRC, axis=-1, keepdims=True))
                weights_BKRC, shrink_BKR1 = jnp.exp(logits_BKRC - new_BKR1), jnp.exp(peak_BKR1 - new_BKR1)
                total_BKR1 = total_BKR1 * shrink_BKR1 + jnp.sum(weights_BKRC, axis=-1, keepdims=True)
                v_BKCH = _keys(v_BSKH, cols.starts, spec)
                acc_BKRH = acc_BKRH * shrink_BKR1 + _product("BKRC,BKCH->BKRH", weights_BKRC, v_BKCH)
                return acc_BKRH, total_BKR1, new_BKR1

            return jax.lax.fori_loop(first_AI[a, i], last_AI[a, i], key_block, state)

        init = (_full((B, K, G * P, H), 0.0, q_BTNH), *(_full((B, K, G * P, 1), x, q_BTNH) for x in (0.0, FLOOR)))
        acc_BKRH, total_BKR1, peak_BKR1 = _each_kind(A, kind, init)
        # A row that sees no key sums to 0; its logsumexp is NEG_INF, the weight it has when outputs are merged.
        empty_BKR1 = total_BKR1 == 0.0
        safe_BKR1 = jnp.where(empty_BKR1, 1.0, total_BKR1)
        logsumexp_BKR1 = jnp.where(empty_BKR1, NEG_INF, peak_BKR1 + jnp.log(safe_BKR1))
        blocks, place = (acc_BKRH / safe_BKR1, logsumexp_BKR1), _at(queries, (0, i))
        return tuple(_put(x, block, 0, place) for x, block in zip(outputs, blocks, strict=True))

    init = (_full((1, B, T, N, H), 0.0, q_BTNH, q_BTNH.dtype), _full((1, B, T, N, 1), 0.0, q_BTNH))
    out_1BTNH, logsumexp_1BTN1 = jax.lax.fori_loop(0, queries.starts.shape[1], query_block, init)
    return out_1BTNH[0], logsumexp_1BTN1[0, ..., 0]


def backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_BTN, d_out_BTNH, d_logsumexp_BTN, marks: Marks, spec: Spec):
    """Returns the gradients of q, k and v from the outputs of `forward` and the cotangents of both."""
    q_ABTNH = by_kind(q_BTNH, spec)
    B, S, K, H = k_BSKH.shape
    P, R = spec.block_q, spec.block_q * q_ABTNH.shape[3] // K
    queries, keys = cut_both(marks, spec)
    first_AI, last_AI = _ranges(queries, keys, spec)

    def query_block(i, grads):
        start = queries.starts[0, i]
        out_BKRH, d_out_BKRH = (_rows(x[None], 0, start, P, K) for x in (out_BTNH, d_out_BTNH))
        peak_BKR1, d_logsumexp_BKR1 = (
            _rows(x[None, ..., None], 0, start, P, K) for x in (logsumexp_BTN, d_logsumexp_BTN)
        )
        peak_BKR1 = jnp.maximum(peak_BKR1, FLOOR)  # rows that see nothing: weights 0, as in the forward
        overlap_BKRH = out_BKRH.astype(jnp.float32) * d_out_BKRH
        shift_BKR1 = jnp.sum(overlap_BKRH, axis=-1, keepdims=True) - d_logsumexp_BKR1

        def kind(a, grads):
            dq_ABTNH, dk_BKSH, dv_BKSH = grads
            rows = _at(queries, (a, i))
            q_BKRH = _rows(q_ABTNH, a, start, P, K)

            def key_block(j, state):
                dq_BKRH, dk_BKSH, dv_BKSH = state
                cols = _at(keys, j)
                k_BKCH, v_BKCH = (_keys(x, cols.starts, spec) for x in (k_BSKH, v_BSKH))
                weights_BKRC = jnp.exp(_logits(q_BKRH, k_BKCH, rows, cols, spec) - peak_BKR1)
                d_weights_BKRC = _product("BKRH,BKCH->BKRC", d_out_BKRH, v_BKCH)
                d_logits_BKRC = weights_BKRC * (d_weights_BKRC - shift_BKR1) * spec.scale
                dq_BKRH += _product("BKRC,BKCH->BKRH", d_logits_BKRC, k_BKCH)
                dk_BKSH = _add(dk_BKSH, _product("BKRC,BKRH->BKCH", d_logits_BKRC, q_BKRH), cols.starts)
                dv_BKSH = _add(dv_BKSH, _product("BKRC,BKRH->BKCH", weights_BKRC, d_out_BKRH), cols.starts)
                return dq_BKRH, dk_BKSH, dv_BKSH

            init = (_full((B, K, R, H), 0.0, q_BTNH), dk_BKSH, dv_BKSH)
            dq_BKRH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(first_AI[a, i], last_AI[a, i], key_block, init)
            return _put(dq_ABTNH, dq_BKRH, a, rows), dk_BKSH, dv_BKSH

        return _each_kind(q_ABTNH.shape[0], kind, grads)

    init = _full(q_ABTNH.shape, 0.0, q_BTNH, q_BTNH.dtype), *(_full((B, K, S, H), 0.0, q_BTNH) for _ in range(2))
    dq_ABTNH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(0, queries.starts.shape[1], query_block, init)
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 1, 2) for x in (dk_BKSH, dv_BKSH))
    return dq_ABTNH.reshape(q_BTNH.shape), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def by_kind(q_BTNH, spec: Spec):
    """Returns the queries with an axis of kinds in front, which plain attention's have not."""
    return q_BTNH if spec.stride else q_BTNH[None]


def _each_kind(A: int, body, init):
    return body(0, init) if A == 1 else jax.lax.fori_loop(0, A, body, init)


def _at(blocks: Blocks, index) -> Blocks:
    """One block, without its leading axes."""
    return jax.tree.map(lambda x: x[index], blocks)


def _product(subscripts: str, left, right):
    """Batched matrix product in the type of `right`, the stored operand, accumulated in float32."""
    return jnp.einsum(subscripts, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _logits(q_BKRH, k_BKCH, rows: Blocks, cols: Blocks, spec: Spec):
    """Scaled logits of one pair of blocks, NEG_INF where the query may not see the key."""
    logits_BKRC = _product("BKRH,BKCH->BKRC", q_BKRH, k_BKCH) * spec.scale
    B, K, R, C = logits_BKRC.shape
    mask_BPC = rows.segment_ids[:, :, None] == cols.segment_ids[:, None, :]
    mask_BPC &= (rows.segment_ids != 0)[:, :, None]
    if spec.causal:
        mask_BPC &= cols.positions[:, None, :] <= rows.positions[:, :, None]
    if rows.since is not None:
        mask_BPC &= cols.positions[:, None, :] >= rows.since[:, :, None]
    logits_BKGPC = logits_BKRC.reshape(B, K, R // spec.block_q, spec.block_q, C)
    return jnp.where(mask_BPC[:, None, None], logits_BKGPC, NEG_INF).reshape(B, K, R, C)


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


def _ranges(queries: Blocks, keys: Blocks, spec: Spec):
    """Returns [A, I] the first key block that a query block needs for any row of the batch, and one past the last."""
    return bounds(by_pairs(seen, queries, keys, spec), axis=(2, 3))


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


def _rows(x_ABTNX, a, start, size: int, K: int):
    """Cuts `size` positions out and folds the query heads of one kv head into rows: [B, K, G * size, X]."""
    _, B, _, N, X = x_ABTNX.shape
    x_BPNX = jax.lax.dynamic_slice(x_ABTNX, (a, 0, start, 0, 0), (1, B, size, N, X))[0]
    return jnp.transpose(x_BPNX.reshape(B, size, K, N // K, X), (0, 2, 3, 1, 4)).reshape(B, K, N // K * size, X)


def _keys(x_BSKH, start, spec: Spec):
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x_BSKH, start, spec.block_k, axis=1), 2, 1)


def _put(x_ABTNX, block_BKRX, a, place: Blocks):
    """Inverse of `_rows`: writes one block, leaving alone what the block before has written."""
    _, B, T, N, X = x_ABTNX.shape
    (P,), K, start = place.stale.shape, block_BKRX.shape[1], (a, 0, place.starts, 0, 0)
    block_BPNX = jnp.transpose(block_BKRX.reshape(B, K, N // K, P, X), (0, 3, 1, 2, 4)).reshape(B, P, N, X)
    block_1BPNX = block_BPNX.astype(x_ABTNX.dtype)[None]
    if T % P:
        old_1BPNX = jax.lax.dynamic_slice(x_ABTNX, start, block_1BPNX.shape)
        block_1BPNX = jnp.where(place.stale[None, None, :, None, None], old_1BPNX, block_1BPNX)
    return jax.lax.dynamic_update_slice(x_ABTNX, block_1BPNX, start)


def _add(x_BKSH, block_BKCH, start):
    old_BKCH = jax.lax.dynamic_slice_in_dim(x_BKSH, start, block_BKCH.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x_BKSH, old_BKCH + block_BKCH, start, axis=2)


def _full(shape, value: float, like, dtype=jnp.float32):
    """A constant that varies over the manual mesh axes `like` varies over: the start of a loop over such values."""
    return jnp.full_like(like, value, shape=shape, dtype=dtype)
