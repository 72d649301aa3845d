"""Blockwise attention as Pallas kernels for TPU: algorithm, residuals and block skipping of `ops.blockwise`.

FlashAttention-2 (Dao, arXiv:2307.08691): one kernel forward, one for the gradient of the queries, one for that of keys
and values. The library kernels of jax take causality from indices and leave rows that see no key undefined; these take
positions and segment ids as they are at run time.

With dual chunk attention a query comes in three rotations (`ops.dual_chunk`). All are given to the kernels, and each
step of the grid fetches the one that its block of keys is to meet: the keys are read once, by one softmax.

Two blocks all of whose pairs are visible need no mask: that is a third of the arithmetic on logits (`walk.Place`).
Logits are in units of log 2, in which a TPU has its exponential.

Logits are held transposed, keys by rows. Whatever is known per query (peak, total, logsumexp, position) is then one row
of a tile instead of a column, which a TPU would pad to 128 lanes, and the maximum over keys needs no lane reduction.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim; I query blocks
of P positions, J key blocks of C positions; R = G*P, the rows of a query block: the heads that share a kv head, so its
keys are read once. What goes into a kernel has six axes: [A or 1, B, K or 1, blocks, rows, columns].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.ops import blocks, blockwise
from qwen_jax.ops.blocks import Marks, Spec
from qwen_jax.ops.blockwise import FLOOR, NEG_INF
from qwen_jax.ops.kernels import walk
from qwen_jax.ops.kernels.walk import Walk

LANES = 128
LOG2E = math.log2(math.e)
ROWS, BLOCK_K = 1024, 512  # R and C where lengths allow: 2 MB of float32 logits in VMEM
QUERIES, KEYS = "queries", "keys"  # which of the two an array is cut along, and which one the outer loop of a kernel


def forward(q_BTNH, k_BSKH, v_BSKH, marks: Marks, spec: Spec, *, interpret: bool = False):
    """Returns out_BTNH and logsumexp_BTN under the contract of `ops.attention.attention`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: float32 or bfloat16; queries [A, B, T, N, H] with a stride.
      marks: positions and segment ids, any values.
      spec: scale, causality and stride; the block sizes are the kernel's own.
      interpret: run on any platform, slowly: for tests.
    """
    q_ABTNH = blockwise.by_kind(q_BTNH, spec)
    (B, T, N, H), K = q_ABTNH.shape[1:], k_BSKH.shape[2]
    P, C = _block_sizes(T, k_BSKH.shape[1], N // K, spec)
    tiles, of_queries, _ = _tile(marks, spec._replace(block_q=P, block_k=C), N // K)
    inputs = [(QUERIES, _fold(q_ABTNH, P, K)), (KEYS, _fold(k_BSKH, C, K)), (KEYS, _fold(v_BSKH, C, K)), *tiles]
    I, R = inputs[0][1].shape[3:5]
    out_1BKIRH, logsumexp_1BKI1R = _call(
        functools.partial(_forward_kernel, spec),
        QUERIES,
        walk.make(*of_queries, every_kind=False),
        inputs,
        [((1, B, K, I, R, H), q_BTNH.dtype), ((1, B, K, I, 1, R), jnp.float32)],
        [(H, R), (1, R), (1, R)],
        interpret,
    )
    logsumexp_1BTN1 = _unfold(jnp.swapaxes(logsumexp_1BKI1R, -2, -1), T, P)
    return _unfold(out_1BKIRH, T, P)[0], logsumexp_1BTN1[0, ..., 0]


def backward(
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_BTN, d_out_BTNH, d_logsumexp_BTN, marks, spec, *, interpret=False
):
    """Returns the gradients of q, k and v from the outputs of `forward` and the cotangents of both."""
    q_ABTNH = blockwise.by_kind(q_BTNH, spec)
    (T, N), (S, K) = q_ABTNH.shape[2:4], k_BSKH.shape[1:3]
    P, C = _block_sizes(T, S, N // K, spec)
    tiles, of_queries, of_keys = _tile(marks, spec._replace(block_q=P, block_k=C), N // K)
    shift_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH, axis=-1) - d_logsumexp_BTN
    stats = [jnp.swapaxes(_fold(x[..., None], P, K), -2, -1) for x in (logsumexp_BTN, shift_BTN)]
    q_ABKIRH, k_1BKJCH, v_1BKJCH = _fold(q_ABTNH, P, K), _fold(k_BSKH, C, K), _fold(v_BSKH, C, K)
    inputs = [(QUERIES, q_ABKIRH), (KEYS, k_1BKJCH), (KEYS, v_1BKJCH), *tiles, (QUERIES, _fold(d_out_BTNH, P, K))]
    inputs += [(QUERIES, x) for x in stats]
    rows, keys = q_ABKIRH.shape, k_1BKJCH.shape
    (dq_ABKIRH,) = _call(
        functools.partial(_dq_kernel, spec),
        QUERIES,
        walk.make(*of_queries, every_kind=True),
        inputs,
        [(rows, q_BTNH.dtype)],
        [rows[-2:]],
        interpret,
    )
    dk_1BKJCH, dv_1BKJCH = _call(
        functools.partial(_dkv_kernel, spec),
        KEYS,
        walk.make(*of_keys, every_kind=False),
        inputs,
        [(keys, k_BSKH.dtype), (keys, v_BSKH.dtype)],
        [keys[-2:], keys[-2:]],
        interpret,
    )
    dq_ABTNH = _unfold(dq_ABKIRH, T, P)
    return dq_ABTNH.reshape(q_BTNH.shape), _unfold(dk_1BKJCH, S, C)[0], _unfold(dv_1BKJCH, S, C)[0]


def _forward_kernel(spec, place, q, k, v, *refs):
    *marks, out, logsumexp, acc_HR, total_1R, peak_1R = refs

    @pl.when(place.opens)
    def _():
        acc_HR[...] = jnp.zeros_like(acc_HR)
        total_1R[...] = jnp.zeros_like(total_1R)
        peak_1R[...] = jnp.full_like(peak_1R, FLOOR)

    @_at_each_pair(place)
    def _(masked):
        logits_CR = _logits(q, k, masked and marks, spec)
        old_1R = peak_1R[...]
        new_1R = jnp.maximum(old_1R, jnp.max(logits_CR, axis=0, keepdims=True))
        weights_CR, shrink_1R = jnp.exp2(logits_CR - new_1R), jnp.exp2(old_1R - new_1R)
        total_1R[...] = total_1R[...] * shrink_1R + jnp.sum(weights_CR, axis=0, keepdims=True)
        acc_HR[...] = acc_HR[...] * shrink_1R + _dot(v[...], weights_CR.astype(v.dtype), 0, 0)
        peak_1R[...] = new_1R

    @pl.when(place.closes)
    def _():
        empty_1R = total_1R[...] == 0.0
        safe_1R = jnp.where(empty_1R, 1.0, total_1R[...])
        out[...] = (acc_HR[...] / safe_1R).T.astype(out.dtype)
        logsumexp[...] = jnp.where(empty_1R, NEG_INF, peak_1R[...] / LOG2E + jnp.log(safe_1R))


def _dq_kernel(spec, place, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dq, acc_RH = refs

    @pl.when(place.kind_opens)
    def _():
        acc_RH[...] = jnp.zeros_like(acc_RH)

    @_at_each_pair(place)
    def _(masked):
        _, d_logits_CR = _weights(q, k, v, d_out, logsumexp, shift, masked and marks, spec)
        acc_RH[...] += _dot(d_logits_CR.astype(k.dtype), k[...], 0, 0)

    @pl.when(place.kind_closes)
    def _():
        dq[...] = (acc_RH[...] * spec.scale).astype(dq.dtype)


def _dkv_kernel(spec, place, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dk, dv, dk_CH, dv_CH = refs

    @pl.when(place.opens)
    def _():
        dk_CH[...] = jnp.zeros_like(dk_CH)
        dv_CH[...] = jnp.zeros_like(dv_CH)

    @_at_each_pair(place)
    def _(masked):
        weights_CR, d_logits_CR = _weights(q, k, v, d_out, logsumexp, shift, masked and marks, spec)
        dk_CH[...] += _dot(d_logits_CR.astype(q.dtype), q[...], 1, 0)
        dv_CH[...] += _dot(weights_CR.astype(d_out.dtype), d_out[...], 1, 0)

    @pl.when(place.closes)
    def _():
        dk[...] = (dk_CH[...] * spec.scale).astype(dk.dtype)
        dv[...] = dv_CH[...].astype(dv.dtype)


def _at_each_pair(place):
    """Runs the decorated function, given whether a mask is needed, where the step has a pair of blocks."""

    def run(kernel):
        pl.when(place.masked)(functools.partial(kernel, True))
        pl.when(place.clear)(functools.partial(kernel, False))

    return run


def _weights(q, k, v, d_out, logsumexp, shift, marks, spec):
    """Softmax weights of one pair of blocks and the gradient of its logits before scaling, both [C, R] float32."""
    peak_1R = jnp.maximum(logsumexp[...] * LOG2E, FLOOR)  # rows that see nothing: weights 0, as in the forward
    weights_CR = jnp.exp2(_logits(q, k, marks, spec) - peak_1R)
    d_weights_CR = _dot(v[...], d_out[...].astype(v.dtype), 1, 1)
    return weights_CR, weights_CR * (d_weights_CR - shift[...])


def _logits(q, k, marks, spec):
    """Scaled logits in units of log 2; NEG_INF where a query may not see the key, if there are marks to tell."""
    logits_CR = _dot(k[...], q[...], 1, 1) * (spec.scale * LOG2E)
    if not marks:
        return logits_CR
    q_segment_ids, kv_segment_ids, q_positions, kv_positions, *since = (mark[...] for mark in marks)
    mask_CR = (_column(kv_segment_ids) == q_segment_ids) & (q_segment_ids != 0)
    if spec.causal:
        kv_positions_C1 = _column(kv_positions)
        mask_CR &= kv_positions_C1 <= q_positions
        for since_1R in since:
            mask_CR &= kv_positions_C1 >= since_1R
    return jnp.where(mask_CR, logits_CR, NEG_INF)


def _column(x_1C):
    """[1, C] -> [C, 1]; eight rows because a TPU transposes whole tiles."""
    return jnp.broadcast_to(x_1C, (8, x_1C.shape[1])).T[:, :1]


def _dot(left, right, left_axis: int, right_axis: int):
    """Product of two tiles over one axis of each, accumulated in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _call(kernel, outer: str, of_outer: Walk, inputs, outputs, scratch, interpret: bool):
    """Runs `kernel` at every step of the walk; an axis of kinds or heads that an array has not is of size 1."""

    def spec(along: str, shape):
        def index(b, head, two, step, *walked):
            place = walk.locate(Walk(*walked), b, two, step)
            block = place.outer if along == outer else place.inner
            return place.kind if shape[0] > 1 else 0, b, head if shape[2] > 1 else 0, block, 0, 0

        return pl.BlockSpec((None,) * 4 + shape[-2:], index)

    def body(*refs):
        walked, refs = Walk(*refs[: len(of_outer)]), refs[len(of_outer) :]
        kernel(walk.locate(walked, pl.program_id(0), pl.program_id(2), pl.program_id(3)), *refs)

    B, K = inputs[1][1].shape[1:3]
    varying = jax.typeof(inputs[0][1]).mat
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(of_outer),
            grid=(B, K, *walk.grid(of_outer)),
            in_specs=[spec(along, x.shape) for along, x in inputs],
            out_specs=[spec(outer, shape) for shape, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
    )(*of_outer, *(x for _, x in inputs))


def _block_sizes(T: int, S: int, G: int, spec: Spec) -> tuple[int, int]:
    """Positions of a query block and of a key block: multiples of LANES, which divide the stride where they can."""

    def size(most: int, length: int) -> int:
        lanes = max(most // LANES, 1)
        if spec.stride is not None:
            lanes = next((n for n in range(lanes, lanes // 2, -1) if spec.stride % (n * LANES) == 0), lanes)
        return min(lanes, -(-length // LANES)) * LANES

    return size(ROWS // G, T), size(BLOCK_K, S)


def _tile(marks: Marks, spec: Spec, G: int):
    """Returns the marks cut into rows of tiles, each query block's ranges of key blocks, and vice versa; [A, B, …]."""
    sizes = (spec.block_q, spec.block_k) * 2
    padded = Marks(*(_pad(x, 1, size) for x, size in zip(marks, sizes, strict=True)))
    queries, keys = blocks.cut_both(padded, spec)
    seen_AIJB, clear_AIJB = (blocks.by_pairs(f, queries, keys, spec) for f in (blocks.seen, blocks.clear))

    def ranges(axis):
        found = *blocks.bounds(seen_AIJB, axis), *blocks.first_run(clear_AIJB, axis)
        return [jnp.swapaxes(x, 1, 2) for x in found]

    # One row per block, repeated for each head of the group: a [1, R] tile that broadcasts against [C, R] logits.
    def of_rows(x_AIBP):
        return QUERIES, jnp.tile(jnp.swapaxes(x_AIBP, 1, 2)[:, :, None, :, None], (1,) * 5 + (G,))

    def of_columns(x_JBC):
        return KEYS, jnp.swapaxes(x_JBC, 0, 1)[None, :, None, :, None]

    tiles = [of_rows(queries.segment_ids), of_columns(keys.segment_ids)]
    tiles += [of_rows(queries.positions), of_columns(keys.positions)]
    return tiles + ([] if queries.since is None else [of_rows(queries.since)]), ranges(2), ranges(1)


def _pad(x, axis: int, size: int):
    """Zeros behind `axis`, to a multiple of `size`; 0 is also the segment id of what is not there."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths)


def _fold(x, size: int, K: int):
    """[A, B, T, N, X] -> [A, B, K, blocks, G * size, X]; without an axis of kinds A is 1."""
    x_ABTNX = _pad(x if x.ndim == 5 else x[None], 2, size)
    A, B, T, N, X = x_ABTNX.shape
    x_ABIPKGX = x_ABTNX.reshape(A, B, T // size, size, K, N // K, X)
    return jnp.transpose(x_ABIPKGX, (0, 1, 4, 2, 5, 3, 6)).reshape(A, B, K, T // size, N // K * size, X)


def _unfold(x_ABKIRX, T: int, size: int):
    """Inverse of `_fold`: [A, B, T, N, X]."""
    A, B, K, I, R, X = x_ABKIRX.shape
    x_ABIPKGX = jnp.transpose(x_ABKIRX.reshape(A, B, K, I, R // size, size, X), (0, 1, 3, 5, 2, 4, 6))
    return x_ABIPKGX.reshape(A, B, I * size, R // size * K, X)[:, :, :T]


def visited(marks: Marks, spec: Spec, G: int) -> tuple[jax.Array, int, int]:
    """What the kernels compute, which no compiler reports: for benchmarks.

    Args:
      marks, spec: as in `forward`.
      G: query heads per kv head.

    Returns:
      pairs of blocks that one kv head visits, summed over kinds and batch; pairs there are; logits in one pair.
    """
    (B, T), S = marks.q_positions_BT.shape, marks.kv_positions_BS.shape[1]
    P, C = _block_sizes(T, S, G, spec)
    _, (first, last, *_), _ = _tile(marks, spec._replace(block_q=P, block_k=C), G)
    return jnp.sum(jnp.maximum(last - first, 0)), B * -(-T // P) * -(-S // C), G * P * C
