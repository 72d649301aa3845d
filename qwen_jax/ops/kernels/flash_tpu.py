"""Blockwise attention as Pallas kernels for TPU: algorithm, residuals and block skipping of `ops.blockwise`.

FlashAttention-2 (Dao, arXiv:2307.08691): one kernel forward, one for the gradient of the queries, one for that of keys
and values. The library kernels of jax take causality from indices and leave rows that see no key undefined; these take
positions and segment ids as they are at run time.

Logits are held transposed, keys by rows. Whatever is known per query (peak, total, logsumexp, position) is then one row
of a tile instead of a column, which a TPU would pad to 128 lanes, and the maximum over keys needs no lane reduction.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim; I query blocks of P positions, J key
blocks of C positions; R = G*P, the rows of a query block: the heads that share a kv head, so its keys are read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.ops import blockwise
from qwen_jax.ops.blockwise import FLOOR, NEG_INF, Marks, Spec

LANES = 128
ROWS, BLOCK_K = 1024, 512  # R and C where lengths allow: 2 MB of float32 logits in VMEM
QUERIES, KEYS = "queries", "keys"  # which of the two an array is cut along, and which one the outer loop of a kernel


def forward(q_BTNH, k_BSKH, v_BSKH, marks: Marks, spec: Spec, *, interpret: bool = False):
    """Returns out_BTNH and logsumexp_BTN under the contract of `ops.attention.attention`.

    Args:
      q_BTNH, k_BSKH, v_BSKH: float32 or bfloat16.
      marks: positions and segment ids, any values.
      spec: scale and causality; the block sizes are the kernel's own.
      interpret: run on any platform, slowly: for tests.
    """
    (T, N, H), K = q_BTNH.shape[1:], k_BSKH.shape[2]
    P, C = _block_sizes(q_BTNH, k_BSKH)
    tiles, row_bounds, _ = _tile(marks, P, C, N // K, spec.causal)
    inputs = [(QUERIES, _fold(q_BTNH, P, K)), (KEYS, _fold(k_BSKH, C, K)), (KEYS, _fold(v_BSKH, C, K)), *tiles]
    rows = inputs[0][1].shape
    out_BKIRH, logsumexp_BKI1R = _call(
        functools.partial(_forward_kernel, spec),
        QUERIES,
        row_bounds,
        inputs,
        [(QUERIES, rows, q_BTNH.dtype), (QUERIES, (*rows[:3], 1, rows[3]), jnp.float32)],
        [(H, rows[3]), (1, rows[3]), (1, rows[3])],
        interpret,
    )
    logsumexp_BTN1 = _unfold(jnp.swapaxes(logsumexp_BKI1R, 3, 4), T, P)
    return _unfold(out_BKIRH, T, P), logsumexp_BTN1[..., 0]


def backward(
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_BTN, d_out_BTNH, d_logsumexp_BTN, marks, spec, *, interpret=False
):
    """Returns the gradients of q, k and v from the outputs of `forward` and the cotangents of both."""
    (T, N), (S, K) = q_BTNH.shape[1:3], k_BSKH.shape[1:3]
    P, C = _block_sizes(q_BTNH, k_BSKH)
    tiles, row_bounds, key_bounds = _tile(marks, P, C, N // K, spec.causal)
    shift_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH, axis=-1) - d_logsumexp_BTN
    stats = [jnp.swapaxes(_fold(x[..., None], P, K), 3, 4) for x in (logsumexp_BTN, shift_BTN)]
    q_BKIRH, d_out_BKIRH = _fold(q_BTNH, P, K), _fold(d_out_BTNH, P, K)
    k_BKJCH, v_BKJCH = _fold(k_BSKH, C, K), _fold(v_BSKH, C, K)
    inputs = [(QUERIES, q_BKIRH), (KEYS, k_BKJCH), (KEYS, v_BKJCH), *tiles, (QUERIES, d_out_BKIRH)]
    inputs += [(QUERIES, x) for x in stats]
    rows, keys = q_BKIRH.shape, k_BKJCH.shape
    (dq_BKIRH,) = _call(
        functools.partial(_dq_kernel, spec),
        QUERIES,
        row_bounds,
        inputs,
        [(QUERIES, rows, q_BTNH.dtype)],
        [rows[3:]],
        interpret,
    )
    dk_BKJCH, dv_BKJCH = _call(
        functools.partial(_dkv_kernel, spec),
        KEYS,
        key_bounds,
        inputs,
        [(KEYS, keys, k_BSKH.dtype), (KEYS, keys, v_BSKH.dtype)],
        [keys[3:], keys[3:]],
        interpret,
    )
    return _unfold(dq_BKIRH, T, P), _unfold(dk_BKJCH, S, C), _unfold(dv_BKJCH, S, C)


def _forward_kernel(spec, step, q, k, v, *refs):
    *marks, out, logsumexp, acc_HR, total_1R, peak_1R = refs

    @step.first
    def _():
        acc_HR[...] = jnp.zeros_like(acc_HR)
        total_1R[...] = jnp.zeros_like(total_1R)
        peak_1R[...] = jnp.full_like(peak_1R, FLOOR)

    @step.every
    def _():
        logits_CR = _logits(q, k, marks, spec)
        old_1R = peak_1R[...]
        new_1R = jnp.maximum(old_1R, jnp.max(logits_CR, axis=0, keepdims=True))
        weights_CR, shrink_1R = jnp.exp(logits_CR - new_1R), jnp.exp(old_1R - new_1R)
        total_1R[...] = total_1R[...] * shrink_1R + jnp.sum(weights_CR, axis=0, keepdims=True)
        acc_HR[...] = acc_HR[...] * shrink_1R + _dot(v[...], weights_CR.astype(v.dtype), 0, 0)
        peak_1R[...] = new_1R

    @step.last
    def _():
        empty_1R = total_1R[...] == 0.0
        safe_1R = jnp.where(empty_1R, 1.0, total_1R[...])
        out[...] = (acc_HR[...] / safe_1R).T.astype(out.dtype)
        logsumexp[...] = jnp.where(empty_1R, NEG_INF, peak_1R[...] + jnp.log(safe_1R))


def _dq_kernel(spec, step, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dq, acc_RH = refs

    @step.first
    def _():
        acc_RH[...] = jnp.zeros_like(acc_RH)

    @step.every
    def _():
        _, d_logits_CR = _weights(q, k, v, d_out, logsumexp, shift, marks, spec)
        acc_RH[...] += _dot(d_logits_CR.astype(k.dtype), k[...], 0, 0)

    @step.last
    def _():
        dq[...] = acc_RH[...].astype(dq.dtype)


def _dkv_kernel(spec, step, q, k, v, *refs):
    *marks, d_out, logsumexp, shift, dk, dv, dk_CH, dv_CH = refs

    @step.first
    def _():
        dk_CH[...] = jnp.zeros_like(dk_CH)
        dv_CH[...] = jnp.zeros_like(dv_CH)

    @step.every
    def _():
        weights_CR, d_logits_CR = _weights(q, k, v, d_out, logsumexp, shift, marks, spec)
        dk_CH[...] += _dot(d_logits_CR.astype(q.dtype), q[...], 1, 0)
        dv_CH[...] += _dot(weights_CR.astype(d_out.dtype), d_out[...], 1, 0)

    @step.last
    def _():
        dk[...] = dk_CH[...].astype(dk.dtype)
        dv[...] = dv_CH[...].astype(dv.dtype)


def _weights(q, k, v, d_out, logsumexp, shift, marks, spec):
    """Softmax weights of one pair of blocks and the gradient of its logits, both [C, R] float32."""
    peak_1R = jnp.maximum(logsumexp[...], FLOOR)  # rows that see nothing: weights 0, as in the forward
    weights_CR = jnp.exp(_logits(q, k, marks, spec) - peak_1R)
    d_weights_CR = _dot(v[...], d_out[...].astype(v.dtype), 1, 1)
    return weights_CR, weights_CR * (d_weights_CR - shift[...]) * spec.scale


def _logits(q, k, marks, spec):
    q_positions, kv_positions, q_segment_ids, kv_segment_ids = (mark[...] for mark in marks)
    mask_CR = (_column(kv_segment_ids) == q_segment_ids) & (q_segment_ids != 0)
    if spec.causal:
        mask_CR &= _column(kv_positions) <= q_positions
    return jnp.where(mask_CR, _dot(k[...], q[...], 1, 1) * spec.scale, NEG_INF)


def _column(x_1C):
    """[1, C] -> [C, 1]; eight rows because a TPU transposes whole tiles."""
    return jnp.broadcast_to(x_1C, (8, x_1C.shape[1])).T[:, :1]


def _dot(left, right, left_axis: int, right_axis: int):
    """Product of two tiles over one axis of each, accumulated in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


class _Step:
    """Where the inner loop of a kernel stands; `bounds` are its ranges of blocks, in scalar memory."""

    def __init__(self, first_ref, last_ref):
        b, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        self.first = pl.when(step == 0)
        self.every = pl.when(first_ref[b, outer] + step < last_ref[b, outer])
        self.last = pl.when(step == pl.num_programs(3) - 1)


def _call(kernel, outer: str, bounds, inputs, outputs, scratch, interpret: bool):
    """Runs `kernel` for every block of `outer`, its range of the other's blocks innermost.

    A block beyond the range is neither computed nor fetched: its index stays at the last one that was.
    """

    def spec(along: str, shape):
        def index(b, head, block, step, first, last):
            if along != outer:
                block = jnp.maximum(jnp.minimum(first[b, block] + step, last[b, block] - 1), 0)
            return (b, head, block, 0, 0) if len(shape) == 5 else (b, block, 0, 0)

        return pl.BlockSpec((None,) * (len(shape) - 2) + shape[-2:], index)

    def body(first, last, *refs):
        kernel(_Step(first, last), *refs)

    count = {along: x.shape[2] for along, x in inputs[:2]}
    varying = jax.typeof(inputs[0][1]).mat
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(shape, t, manual_axis_type=varying) for _, shape, t in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*inputs[0][1].shape[:2], count[outer], count[KEYS if outer == QUERIES else QUERIES]),
            in_specs=[spec(along, x.shape) for along, x in inputs],
            out_specs=[spec(along, shape) for along, shape, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
    )(*bounds, *(x for _, x in inputs))


def _block_sizes(q_BTNH, k_BSKH) -> tuple[int, int]:
    G = q_BTNH.shape[2] // k_BSKH.shape[2]
    P, C = max(ROWS // G // LANES, 1) * LANES, BLOCK_K
    return tuple(min(size, -(-x.shape[1] // LANES) * LANES) for size, x in ((P, q_BTNH), (C, k_BSKH)))


def _tile(marks: Marks, P: int, C: int, G: int, causal: bool):
    """Returns the four marks cut into rows of tiles, and the ranges of key blocks per query block and vice versa."""
    padded = Marks(*(_pad(x, size) for x, size in zip(marks, (P, C, P, C), strict=True)))
    queries = blockwise.cut(padded.q_positions_BT, padded.q_segment_ids_BT, P)
    keys = blockwise.cut(padded.kv_positions_BS, padded.kv_segment_ids_BS, C)
    seen_IJB = blockwise.seen(queries, keys, causal)
    row_bounds = tuple(x.T for x in blockwise.bounds(seen_IJB, axis=1))
    key_bounds = tuple(x.T for x in blockwise.bounds(seen_IJB, axis=0))
    # One row per block, repeated for each head of the group: a [1, R] tile that broadcasts against [C, R] logits.
    q_positions_BI1R, q_segment_ids_BI1R = (
        jnp.tile(jnp.swapaxes(x, 0, 1)[:, :, None], (1, 1, 1, G)) for x in (queries.positions, queries.segment_ids)
    )
    kv_positions_BJ1C, kv_segment_ids_BJ1C = (
        jnp.swapaxes(x, 0, 1)[:, :, None] for x in (keys.positions, keys.segment_ids)
    )
    tiles = [(QUERIES, q_positions_BI1R), (KEYS, kv_positions_BJ1C)]
    tiles += [(QUERIES, q_segment_ids_BI1R), (KEYS, kv_segment_ids_BJ1C)]
    return tiles, row_bounds, key_bounds


def _pad(x, size: int):
    """Zeros behind axis 1, to a multiple of `size`; 0 is also the segment id of what is not there."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))


def _fold(x_BTNX, size: int, K: int):
    """[B, T, N, X] -> [B, K, blocks, G * size, X]."""
    x_BTNX = _pad(x_BTNX, size)
    B, T, N, X = x_BTNX.shape
    x_BIPKGX = x_BTNX.reshape(B, T // size, size, K, N // K, X)
    return jnp.transpose(x_BIPKGX, (0, 3, 1, 4, 2, 5)).reshape(B, K, T // size, N // K * size, X)


def _unfold(x_BKIRX, T: int, size: int):
    B, K, I, R, X = x_BKIRX.shape
    x_BIPKGX = jnp.transpose(x_BKIRX.reshape(B, K, I, R // size, size, X), (0, 2, 4, 1, 3, 5))
    return x_BIPKGX.reshape(B, I * size, R // size * K, X)[:, :T]
