"""Blockwise attention: a softmax taken one block of keys at a time, so that no T x S array ever exists.

Forward: the online softmax of Milakov & Gimelshein (arXiv:1805.02867) as used by FlashAttention-2 (arXiv:2307.08691,
algorithm 1). Backward: its algorithm 2, with query blocks outside, keys' gradients accumulated in place.
`ops.blocks` tells which key blocks each query block runs over, and where among them nothing is masked.

Logits stand upright, keys by queries: the large products then contract the last axis of their left side, for which
XLA:CPU has its fastest kernels, maxima and sums run along vectors instead of across them, and a mask is the same for
all heads of a group. Measured there at 2,048 positions in blocks of 128, forward and backward on one core: 214 ms of
CPU time, lying logits 226, torch 246.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim; I query blocks
of P positions, J key blocks of C positions. G and P together are one side of every product: no keys are repeated.
"""

import jax
import jax.numpy as jnp

from qwen_jax.ops import blocks
from qwen_jax.ops.blocks import Blocks, Marks, Spec

NEG_INF = -1e30  # finite, so that a row without any key gives zeros and not NaN
FLOOR = 0.1 * NEG_INF  # running peaks start here: above a masked logit, whose exponential is then 0, below any other
# Times heads of a group: from here on the faster product pays for a transposition of keys or values.
MANY_QUERIES = 64


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
    queries, keys = blocks.cut_both(marks, spec)
    ranges = blocks.ranges(queries, keys, spec)

    def query_block(i, outputs):
        def kind(a, state):
            rows = _at(queries, (a, i))
            q_BKGPH = _rows(q_ABTNH, a, rows.starts, P, K)

            def key_block(j, state):
                acc_BKHGP, total_BK1GP, peak_BK1GP = state
                cols = _at(keys, j)
                bias_BCP = _bias(rows, cols, ranges.clear(a, i, j), spec, q_BTNH)
                logits_BKCGP = _logits(q_BKGPH, _keys(k_BSKH, cols.starts, spec), bias_BCP, spec)
                new_BK1GP = jnp.maximum(peak_BK1GP, jnp.max(logits_BKCGP, axis=2, keepdims=True))
                weights_BKCGP, shrink_BK1GP = jnp.exp(logits_BKCGP - new_BK1GP), jnp.exp(peak_BK1GP - new_BK1GP)
                total_BK1GP = total_BK1GP * shrink_BK1GP + jnp.sum(weights_BKCGP, axis=2, keepdims=True)
                v_BKCH = _keys(v_BSKH, cols.starts, spec)
                acc_BKHGP = acc_BKHGP * shrink_BK1GP + _over_keys(v_BKCH, weights_BKCGP)
                return acc_BKHGP, total_BK1GP, new_BK1GP

            return jax.lax.fori_loop(ranges.first_AI[a, i], ranges.last_AI[a, i], key_block, state)

        init = (_full((B, K, H, G, P), 0.0, q_BTNH), *(_full((B, K, 1, G, P), x, q_BTNH) for x in (0.0, FLOOR)))
        acc_BKHGP, total_BK1GP, peak_BK1GP = _each_kind(A, kind, init)
        # A row that sees no key sums to 0; its logsumexp is NEG_INF, the weight it has when outputs are merged.
        empty_BK1GP = total_BK1GP == 0.0
        safe_BK1GP = jnp.where(empty_BK1GP, 1.0, total_BK1GP)
        logsumexp_BK1GP = jnp.where(empty_BK1GP, NEG_INF, peak_BK1GP + jnp.log(safe_BK1GP))
        found, place = (acc_BKHGP / safe_BK1GP, logsumexp_BK1GP), _at(queries, (0, i))
        return tuple(_put(x, block, 0, place) for x, block in zip(outputs, found, strict=True))

    init = (_full((1, B, T, N, H), 0.0, q_BTNH, q_BTNH.dtype), _full((1, B, T, N, 1), 0.0, q_BTNH))
    out_1BTNH, logsumexp_1BTN1 = jax.lax.fori_loop(0, queries.starts.shape[1], query_block, init)
    return out_1BTNH[0], logsumexp_1BTN1[0, ..., 0]


def backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_BTN, d_out_BTNH, d_logsumexp_BTN, marks: Marks, spec: Spec):
    """Returns the gradients of q, k and v from the outputs of `forward` and the cotangents of both."""
    q_ABTNH = by_kind(q_BTNH, spec)
    B, S, K, H = k_BSKH.shape
    P, G = spec.block_q, q_ABTNH.shape[3] // K
    queries, keys = blocks.cut_both(marks, spec)
    ranges = blocks.ranges(queries, keys, spec)
    peak_BTN = jnp.maximum(logsumexp_BTN, FLOOR)  # rows that see nothing: weights 0, as in the forward
    shift_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH, axis=-1) - d_logsumexp_BTN

    def query_block(i, grads):
        start = queries.starts[0, i]
        d_out_BKGPH = _rows(d_out_BTNH[None], 0, start, P, K)
        peak_BK1GP, shift_BK1GP = (
            _rows(x[None, ..., None], 0, start, P, K)[:, :, None, ..., 0] for x in (peak_BTN, shift_BTN)
        )

        def kind(a, grads):
            dq_ABTNH, dk_BKSH, dv_BKSH = grads
            rows = _at(queries, (a, i))
            q_BKGPH = _rows(q_ABTNH, a, start, P, K)

            def key_block(j, state):
                dq_BKHGP, dk_BKSH, dv_BKSH = state
                cols = _at(keys, j)
                k_BKCH, v_BKCH = (_keys(x, cols.starts, spec) for x in (k_BSKH, v_BSKH))
                bias_BCP = _bias(rows, cols, ranges.clear(a, i, j), spec, q_BTNH)
                weights_BKCGP = jnp.exp(_logits(q_BKGPH, k_BKCH, bias_BCP, spec) - peak_BK1GP)
                d_weights_BKCGP = _by_keys(v_BKCH, d_out_BKGPH)
                d_logits_BKCGP = weights_BKCGP * (d_weights_BKCGP - shift_BK1GP)
                dq_BKHGP += _over_keys(k_BKCH, d_logits_BKCGP)
                dk_BKSH = _add(dk_BKSH, _product("BKCGP,BKGPH->BKCH", d_logits_BKCGP, q_BKGPH), cols.starts)
                dv_BKSH = _add(dv_BKSH, _product("BKCGP,BKGPH->BKCH", weights_BKCGP, d_out_BKGPH), cols.starts)
                return dq_BKHGP, dk_BKSH, dv_BKSH

            init = (_full((B, K, H, G, P), 0.0, q_BTNH), dk_BKSH, dv_BKSH)
            first, last = ranges.first_AI[a, i], ranges.last_AI[a, i]
            dq_BKHGP, dk_BKSH, dv_BKSH = jax.lax.fori_loop(first, last, key_block, init)
            return _put(dq_ABTNH, dq_BKHGP * spec.scale, a, rows), dk_BKSH, dv_BKSH

        return _each_kind(q_ABTNH.shape[0], kind, grads)

    init = _full(q_ABTNH.shape, 0.0, q_BTNH, q_BTNH.dtype), *(_full((B, K, S, H), 0.0, q_BTNH) for _ in range(2))
    dq_ABTNH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(0, queries.starts.shape[1], query_block, init)
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 1, 2) for x in (dk_BKSH * spec.scale, dv_BKSH))
    return dq_ABTNH.reshape(q_BTNH.shape), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def by_kind(q_BTNH, spec: Spec):
    """Returns the queries with an axis of kinds in front, which plain attention's have not."""
    return q_BTNH if spec.stride else q_BTNH[None]


def _each_kind(A: int, body, init):
    return body(0, init) if A == 1 else jax.lax.fori_loop(0, A, body, init)


def _at(cut: Blocks, index) -> Blocks:
    """One block, without its leading axes."""
    return jax.tree.map(lambda x: x[index], cut)


def _product(subscripts: str, left, right):
    """Batched matrix product in the narrower of both types, the stored operand's, accumulated in float32."""
    narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(subscripts, left.astype(narrow), right.astype(narrow), preferred_element_type=jnp.float32)


def _logits(q_BKGPH, k_BKCH, bias_BCP, spec: Spec):
    """Scaled logits of one pair of blocks."""
    return _by_keys(k_BKCH, q_BKGPH) * spec.scale + bias_BCP[:, None, :, None]


def _by_keys(k_BKCH, q_BKGPH):
    """Dot products of keys and queries, [B, K, C, G, P]; of one folded axis of queries, or XLA would transpose them."""
    *_, C, H = k_BKCH.shape
    B, K, G, P, _ = q_BKGPH.shape
    return _product("BKCH,BKRH->BKCR", k_BKCH, q_BKGPH.reshape(B, K, G * P, H)).reshape(B, K, C, G, P)


def _over_keys(x_BKCH, weights_BKCGP):
    """Sums over keys by weights, [B, K, H, G, P]; where queries are few, not worth turning round what is summed."""
    if weights_BKCGP.shape[-1] * weights_BKCGP.shape[-2] < MANY_QUERIES:
        return jnp.moveaxis(_product("BKCGP,BKCH->BKGPH", weights_BKCGP, x_BKCH), -1, 2)
    return _product("BKHC,BKCGP->BKHGP", x_BKCH.mT, weights_BKCGP)


def _bias(rows: Blocks, cols: Blocks, clear, spec: Spec, like):
    """Returns [B, C, P] float32: NEG_INF where the query may not see the key, 0 elsewhere; `clear` says it is all 0.

    The condition keeps the compiler from computing the mask anew for each head, inside the pass over the logits.
    """
    (B, P), C = rows.positions.shape, cols.positions.shape[1]

    def masked():
        mask_BCP = cols.segment_ids[:, :, None] == rows.segment_ids[:, None, :]
        mask_BCP &= (rows.segment_ids != 0)[:, None, :]
        if spec.causal:
            mask_BCP &= cols.positions[:, :, None] <= rows.positions[:, None, :]
        if rows.since is not None:
            mask_BCP &= cols.positions[:, :, None] >= rows.since[:, None, :]
        return jnp.where(mask_BCP, 0.0, NEG_INF)

    return jax.lax.cond(clear, lambda: _full((B, C, P), 0.0, like), masked)


def _rows(x_ABTNX, a, start, size: int, K: int):
    """Cuts `size` positions out and puts the query heads of one kv head together: [B, K, G, size, X]."""
    _, B, _, N, X = x_ABTNX.shape
    x_BPNX = jax.lax.dynamic_slice(x_ABTNX, (a, 0, start, 0, 0), (1, B, size, N, X))[0]
    return jnp.transpose(x_BPNX.reshape(B, size, K, N // K, X), (0, 2, 3, 1, 4))


def _keys(x_BSKH, start, spec: Spec):
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x_BSKH, start, spec.block_k, axis=1), 2, 1)


def _put(x_ABTNX, block_BKXGP, a, place: Blocks):
    """Writes one block, upright, where `_rows` reads it lying, leaving alone what the block before has written."""
    _, B, T, N, X = x_ABTNX.shape
    (P,), start = place.stale.shape, (a, 0, place.starts, 0, 0)
    block_BPNX = jnp.transpose(block_BKXGP, (0, 4, 1, 3, 2)).reshape(B, P, N, X)
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
