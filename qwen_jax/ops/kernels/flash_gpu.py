"""Blockwise attention as Pallas kernels for NVIDIA GPUs, by Triton: algorithm and block skipping of `ops.blockwise`.

FlashAttention-2 (Dao, arXiv:2307.08691): one kernel forward, one for the gradient of the queries, one for that of keys
and values. A program owns one block of one head and loops over the blocks of the other side that it can see, as many as
the positions and segment ids of this run say; with dual chunk attention (`ops.dual_chunk`) first for one kind of query
and then for the next, in one softmax.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim; I query blocks
of P positions, J key blocks of C positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.ops import blocks, blockwise
from qwen_jax.ops.blocks import Marks, Spec
from qwen_jax.ops.blockwise import FLOOR, NEG_INF

BLOCK = 64  # P and C
WARPS, STAGES = 4, 2


def takes(head_dim: int, dtype) -> bool:
    """Tells whether the kernels can.

    Triton's tiles are powers of two, and of at least 16 where they are multiplied. Products of float32 that are not
    rounded to 19 bits have no tensor cores: Triton unrolls them, which it compiles for minutes.
    """
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0 and jnp.dtype(dtype).itemsize == 2


def forward(q_BTNH, k_BSKH, v_BSKH, marks: Marks, spec: Spec, *, interpret: bool = False):
    """Returns out_BTNH and logsumexp_BTN under the contract of `ops.attention.attention`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: as `takes` says, float32 too in tests; queries [A, B, T, N, H] with a stride.
      marks: positions and segment ids, any values.
      spec: scale, causality and stride; the block sizes are the kernel's own.
      interpret: run on any platform, slowly: for tests.
    """
    q_ABTNH = _pad(blockwise.by_kind(q_BTNH, spec), 2)
    keys = [_pad(x, 1) for x in (k_BSKH, v_BSKH)]
    (A, B, T, N, H), G = q_ABTNH.shape, q_BTNH.shape[-2] // k_BSKH.shape[2]
    tiles, of_queries, _ = _tile(marks, spec)
    rows = pl.BlockSpec((None, BLOCK, None, H), lambda i, b, n: (b, i, n, 0))
    stats = pl.BlockSpec((None, BLOCK, None), lambda i, b, n: (b, i, n))
    out_BTNH, logsumexp_BTN = _call(
        functools.partial(_forward_kernel, spec),
        (T // BLOCK, B, N),
        [*of_queries, q_ABTNH, *keys, *tiles],
        [*_per_block(of_queries), _block_of_queries(A, H), *_all_keys(keys, G), *_block_and_all(tiles)],
        [((B, T, N, H), q_BTNH.dtype, rows), ((B, T, N), jnp.float32, stats)],
        interpret,
    )
    return out_BTNH[:, : q_BTNH.shape[-3]], logsumexp_BTN[:, : q_BTNH.shape[-3]]


def backward(
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_BTN, d_out_BTNH, d_logsumexp_BTN, marks, spec, *, interpret=False
):
    """Returns the gradients of q, k and v from the outputs of `forward` and the cotangents of both."""
    q_ABTNH = _pad(blockwise.by_kind(q_BTNH, spec), 2)
    keys, S = [_pad(x, 1) for x in (k_BSKH, v_BSKH)], k_BSKH.shape[1]
    (A, B, T, N, H), K = q_ABTNH.shape, k_BSKH.shape[2]
    G = N // K
    tiles, of_queries, of_keys = _tile(marks, spec)
    shift_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH, axis=-1) - d_logsumexp_BTN
    d_out_BTNH, *stats = (_pad(x, 1) for x in (d_out_BTNH, logsumexp_BTN, shift_BTN))
    inputs = [q_ABTNH, *keys, *tiles, d_out_BTNH, *stats]
    rows = pl.BlockSpec((None, BLOCK, None, H), lambda i, b, n: (b, i, n, 0))
    of_row = pl.BlockSpec((None, BLOCK, None), lambda i, b, n: (b, i, n))
    (dq_ABTNH,) = _call(
        functools.partial(_dq_kernel, spec),
        (T // BLOCK, B, N),
        [*of_queries, *inputs],
        [*_per_block(of_queries), _block_of_queries(A, H), *_all_keys(keys, G), *_block_and_all(tiles), rows]
        + [of_row] * 2,
        [(q_ABTNH.shape, q_BTNH.dtype, _block_of_queries(A, H))],
        interpret,
    )
    block = pl.BlockSpec((None, BLOCK, None, H), lambda j, b, head: (b, j, head, 0))
    all_rows = pl.BlockSpec((None, T, G, H), lambda j, b, head: (b, 0, head, 0))
    all_stats = pl.BlockSpec((None, T, G), lambda j, b, head: (b, 0, head))
    all_queries = pl.BlockSpec((A, None, T, G, H), lambda j, b, head: (0, b, 0, head, 0))
    dk_BSKH, dv_BSKH = _call(
        functools.partial(_dkv_kernel, spec),
        (keys[0].shape[1] // BLOCK, B, K),
        [*of_keys, *inputs],
        [*_per_block(of_keys), all_queries, block, block, *_all_and_block(tiles), all_rows, all_stats, all_stats],
        [(x.shape, x.dtype, block) for x in keys],
        interpret,
    )
    return dq_ABTNH[:, :, : q_BTNH.shape[-3]].reshape(q_BTNH.shape), dk_BSKH[:, :S], dv_BSKH[:, :S]


def _forward_kernel(spec, first, last, q, k, v, *refs):
    *marks, out, logsumexp = refs
    acc_PH = jnp.zeros(out.shape, jnp.float32)
    total_P, peak_P = jnp.zeros(logsumexp.shape, jnp.float32), jnp.full(logsumexp.shape, FLOOR, jnp.float32)
    state = acc_PH, total_P, peak_P
    for kind in range(q.shape[0]):
        q_PH, rows = q[kind], _rows_of(marks, kind, slice(None))

        def block(j, state, q_PH=q_PH, rows=rows):
            acc_PH, total_P, peak_P = state
            at = pl.ds(j * BLOCK, BLOCK)
            logits_PC = _logits(q_PH, k[at, :], rows, _columns_of(marks, at), spec)
            new_P = jnp.maximum(peak_P, jnp.max(logits_PC, axis=1))
            weights_PC, shrink_P = jnp.exp(logits_PC - new_P[:, None]), jnp.exp(peak_P - new_P)
            total_P = total_P * shrink_P + jnp.sum(weights_PC, axis=1)
            return acc_PH * shrink_P[:, None] + _dot(weights_PC.astype(v.dtype), v[at, :]), total_P, new_P

        state = jax.lax.fori_loop(first[kind], last[kind], block, state)
    acc_PH, total_P, peak_P = state
    safe_P = jnp.where(total_P == 0.0, 1.0, total_P)
    out[...] = (acc_PH / safe_P[:, None]).astype(out.dtype)
    logsumexp[...] = jnp.where(total_P == 0.0, NEG_INF, peak_P + jnp.log(safe_P))


def _dq_kernel(spec, first, last, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dq = refs
    d_out_PH, stats = d_out[...].astype(v.dtype), (logsumexp[...], shift[...])
    for kind in range(q.shape[0]):
        q_PH, rows = q[kind], _rows_of(marks, kind, slice(None))

        def block(j, dq_PH, q_PH=q_PH, rows=rows):
            at = pl.ds(j * BLOCK, BLOCK)
            k_CH = k[at, :]
            logits_PC = _logits(q_PH, k_CH, rows, _columns_of(marks, at), spec)
            _, d_logits_PC = _weights(logits_PC, d_out_PH, v[at, :], *stats)
            return dq_PH + _dot(d_logits_PC.astype(k.dtype), k_CH)

        dq_PH = jax.lax.fori_loop(first[kind], last[kind], block, jnp.zeros(q_PH.shape, jnp.float32))
        dq[kind] = (dq_PH * spec.scale).astype(dq.dtype)


def _dkv_kernel(spec, first, last, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dk, dv = refs
    k_CH, v_CH, columns, G = k[...], v[...], _columns_of(marks, slice(None)), q.shape[2]
    state = jnp.zeros(k_CH.shape, jnp.float32), jnp.zeros(v_CH.shape, jnp.float32)
    for kind in range(q.shape[0]):

        def pair(step, state, kind=kind):
            dk_CH, dv_CH = state
            block, head = jax.lax.div(step, jnp.int32(G)), jax.lax.rem(step, jnp.int32(G))
            at = pl.ds((first[kind] + block) * BLOCK, BLOCK)
            q_PH, d_out_PH = q[kind, at, head, :], d_out[at, head, :].astype(v.dtype)
            logits_PC = _logits(q_PH, k_CH, _rows_of(marks, kind, at), columns, spec)
            weights_PC, d_logits_PC = _weights(logits_PC, d_out_PH, v_CH, logsumexp[at, head], shift[at, head])
            dk_CH += _dot(d_logits_PC.astype(q.dtype).T, q_PH)
            return dk_CH, dv_CH + _dot(weights_PC.astype(v.dtype).T, d_out_PH)

        steps = jnp.maximum(last[kind] - first[kind], 0) * G
        state = jax.lax.fori_loop(0, steps, pair, state)
    dk[...], dv[...] = (state[0] * spec.scale).astype(dk.dtype), state[1].astype(dv.dtype)


def _weights(logits_PC, d_out_PH, v_CH, logsumexp_P, shift_P):
    """Softmax weights of one pair of blocks and the gradient of its logits before scaling, float32."""
    weights_PC = jnp.exp(logits_PC - jnp.maximum(logsumexp_P, FLOOR)[:, None])
    return weights_PC, weights_PC * (_dot(d_out_PH, v_CH.T) - shift_P[:, None])


def _logits(q_PH, k_CH, rows, columns, spec: Spec):
    (q_segment_ids_P, q_positions_P, *since), (kv_segment_ids_C, kv_positions_C) = rows, columns
    mask_PC = (q_segment_ids_P[:, None] == kv_segment_ids_C[None]) & (q_segment_ids_P != 0)[:, None]
    if spec.causal:
        mask_PC &= kv_positions_C[None] <= q_positions_P[:, None]
        for since_P in since:
            mask_PC &= kv_positions_C[None] >= since_P[:, None]
    return jnp.where(mask_PC, _dot(q_PH, k_CH.T) * spec.scale, NEG_INF)


def _rows_of(marks, kind, at):
    return [mark[kind, at] for mark in marks[2:]]


def _columns_of(marks, at):
    return [mark[at] for mark in marks[:2]]


def _dot(left, right):
    """Matrix product accumulated in float32; float32 is not rounded to the tensor cores' 19 bits."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def _call(kernel, grid, inputs, in_specs, outputs, interpret: bool):
    from jax.experimental.pallas import triton as plt  # here: most programs are not for a GPU

    varying = jax.typeof(inputs[-1]).mat
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for _, _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in outputs],
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(*inputs)


def _per_block(ranges):
    return [pl.BlockSpec((x.shape[0], None, None), lambda block, b, head: (0, b, block)) for x in ranges]


def _block_of_queries(A: int, H: int):
    return pl.BlockSpec((A, None, BLOCK, None, H), lambda i, b, n: (0, b, i, n, 0))


def _all_keys(keys, G: int):
    return [pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, b, n: (b, 0, n // G, 0)) for x in keys]


def _block_and_all(tiles):
    """Marks of all keys, and of one block of queries."""
    keys = [pl.BlockSpec((None, x.shape[1]), lambda i, b, n: (b, 0)) for x in tiles[:2]]
    return keys + [pl.BlockSpec((x.shape[0], None, BLOCK), lambda i, b, n: (0, b, i)) for x in tiles[2:]]


def _all_and_block(tiles):
    """Marks of one block of keys, and of all queries."""
    keys = [pl.BlockSpec((None, BLOCK), lambda j, b, head: (b, j)) for _ in tiles[:2]]
    return keys + [pl.BlockSpec((x.shape[0], None, x.shape[2]), lambda j, b, head: (0, b, 0)) for x in tiles[2:]]


def _tile(marks: Marks, spec: Spec):
    """Returns marks of keys [B, S] and of queries [A, B, T], and the ranges of blocks [A, B, I] and [A, B, J]."""
    queries, keys = blocks.cut_both(Marks(*(_pad(x, 1) for x in marks)), spec._replace(block_q=BLOCK, block_k=BLOCK))
    seen_AIJB = blocks.by_pairs(blocks.seen, queries, keys, spec)
    of_queries, of_keys = ([jnp.swapaxes(x, 1, 2) for x in blocks.bounds(seen_AIJB, axis)] for axis in (2, 1))
    joined = lambda x: jnp.swapaxes(x, -3, -2).reshape(*x.shape[:-3], x.shape[-2], -1)
    tiles = [joined(x) for x in (keys.segment_ids, keys.positions, queries.segment_ids, queries.positions)]
    return tiles + ([] if queries.since is None else [joined(queries.since)]), of_queries, of_keys


def _pad(x, axis: int):
    """Zeros behind `axis`, to a multiple of BLOCK; 0 is also the segment id of what is not there."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, widths)
