"""Attention: one contract, several back ends.

`reference` forms all T x S logits. It defines what the others must return and serves lengths too small for blocks.
`blockwise` (ops.blockwise) needs memory linear in length and skips blocks that nobody may see; it runs everywhere.
`tpu` (ops.kernels.flash_tpu) is the same as Pallas kernels where the program is compiled for a TPU, and `blockwise`
where it is not. `gpu` (ops.kernels.flash_gpu) likewise for NVIDIA GPUs, by Triton, in 16-bit types with heads whose
size is a power of two; anything else is `blockwise`. (cuDNN, which `jax.nn.dot_product_attention` offers there, takes
causality from indices and packed rows as a T x T mask: not for positions known at run time, nor for dual chunks.)
A kernel cannot be split over a mesh by the compiler: on more than one device call it in `shard_map`.
`auto` takes the reference where both lengths are at most SMALL; the platform's kernel inside a `shard_map` over all
axes of the mesh, from KERNEL_LENGTH queries on; else `blockwise`. It looks at shapes, types and the place of the call
only, never at the devices of this process: what is compiled ahead of time for another machine is what that machine
would have compiled.

Dual chunk attention (`ops.dual_chunk`) is the same with three rotations of each query, by any back end.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, G = N/K query heads per kv head, H
head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.errors import InputError
from qwen_jax.ops import blocks, blockwise, dual_chunk
from qwen_jax.ops.blocks import Marks, Spec
from qwen_jax.ops.blockwise import NEG_INF
from qwen_jax.ops.kernels import flash_gpu, flash_tpu

BACKENDS = ("auto", "reference", "blockwise", "tpu", "gpu")
KERNELS = {"tpu": flash_tpu, "cuda": flash_gpu}
RESIDUALS = "attention"  # checkpoint name of out and logsumexp: a remat policy that saves it spares a second forward
# Measured on XLA:CPU, float32, 8 query and 2 kv heads of 64: up to 64 x 64 the reference is the faster one with its
# gradient (2.2 against 2.5 ms at 64), from 128 on blocks win (7 times at 512).
SMALL = 64
# Larger blocks keep more cores busy, and compute more of the upper triangle: a sixteenth more at LONG.
BLOCK_Q, BLOCK_Q_LONG, LONG = 128, 256, 2048
# Few queries leave room for more keys in a block; twice as many again would read more empty slots of a cache.
BLOCK_K, BLOCK_K_FEW_QUERIES = 128, 256
KERNEL_LENGTH = 128  # fewer queries would leave most of the kernel's tile empty


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
    block_sizes: tuple[int, int] | None = None,
    stride: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention; a query sees the keys of its own segment that are not later than itself.

    kv head g serves query heads g*G ... (g+1)*G - 1 (Ainslie et al., arXiv:2305.13245).

    Args:
      q_BTNH: queries, already rotated; with a stride [A, B, T, N, H], rotated by `dual_chunk.query_positions`.
      k_BSKH: keys, already rotated; K divides N.
      v_BSKH: values.
      q_positions_BT: int32 positions; "later" compares these, not indices.
      kv_positions_BS: int32 positions of the keys.
      q_segment_ids_BT: int32, 0 marks padding, which neither sees nor is seen.
      kv_segment_ids_BS: int32, likewise; also marks the unwritten slots of a cache.
      scale: multiplies the logits; H**-0.5 if None.
      causal: False lets a query see later keys of its segment too.
      backend: one of BACKENDS; "auto" chooses as the module's docstring says.
      block_sizes: greatest number of queries and of keys in a block of `blockwise`; chosen by shape if None.
      stride: length of a chunk of dual chunk attention, which sees what causal attention sees; None is plain attention.

    Returns:
      out_BTNH in the type of q, zero where a query sees nothing; logsumexp_BTN float32 of the scaled logits.

    Raises:
      InputError: on an unknown back end; with a stride also on blocks that do not divide it, and on what has no chunks.
    """
    if backend not in BACKENDS:
        raise InputError(f"attention back end {backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if stride is not None:
        _check_chunks(q_BTNH, stride, causal, block_sizes)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    marks = Marks(q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS)
    T, S = q_BTNH.shape[-3], k_BSKH.shape[1]
    if backend == "auto":
        backend = _choose(T, S)
    if backend == "reference":
        q_ABTNH = q_BTNH[None] if stride is None else q_BTNH
        return _reference(q_ABTNH, k_BSKH, v_BSKH, _masks(marks, causal, stride), scale)
    most_q, most_k = block_sizes or _most(T)
    size = blocks.block_size if stride is None else functools.partial(_size_within_chunks, stride)
    spec = Spec(scale, causal, size(T, most_q), size(S, most_k), stride)
    # In a shard_map queries may vary over more mesh axes than keys: made equal here, whose transpose is the sum over
    # those axes that the gradients of the keys need.
    arrays = (q_BTNH, k_BSKH, v_BSKH, *marks)
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    arrays = [jax.lax.pcast(x, tuple(axes - jax.typeof(x).mat.varying), to="varying") for x in arrays]
    platforms = {"tpu": ("tpu",), "gpu": ("cuda",), "kernels": ("tpu", "cuda")}.get(backend, ())
    if not flash_gpu.takes(q_BTNH.shape[-1], q_BTNH.dtype):
        platforms = tuple(name for name in platforms if name != "cuda")
    return _in_blocks(*arrays[:3], Marks(*arrays[3:]), spec, platforms)


def _check_chunks(q_ABTNH, stride, causal, block_sizes) -> None:
    kinds = len(dual_chunk.KINDS)
    if q_ABTNH.ndim != 5 or q_ABTNH.shape[0] != kinds:
        raise InputError(f"queries have shape {q_ABTNH.shape}; dual chunk attention expects [{kinds}, B, T, N, H]")
    if not causal:
        raise InputError(f"dual chunk attention with causal {causal}; it is causal")
    for size in block_sizes or ():
        if stride % size:
            raise InputError(f"blocks of {size} do not divide the stride of {stride}; expected block_sizes that do")


def _most(T: int) -> tuple[int, int]:
    return BLOCK_Q if T < LONG else BLOCK_Q_LONG, BLOCK_K if T > SMALL else BLOCK_K_FEW_QUERIES


def _size_within_chunks(stride: int, length: int, most: int) -> int:
    """The largest block of at most `most` that divides the stride: then no block of a row from 0 on is cut by a border.

    Where only small ones divide it, `most`: the few blocks that are cut are computed once for either side.
    """
    divisor = next(size for size in range(most, 0, -1) if stride % size == 0)
    return min(length, divisor if 2 * divisor > most else most)


def _choose(T: int, S: int) -> str:
    if max(T, S) <= SMALL:
        return "reference"
    return "kernels" if T >= KERNEL_LENGTH and jax.sharding.get_abstract_mesh().are_all_axes_manual else "blockwise"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _in_blocks(q_BTNH, k_BSKH, v_BSKH, marks: Marks, spec: Spec, platforms: tuple[str, ...]):
    return _dispatch("forward", spec, platforms, q_BTNH, k_BSKH, v_BSKH, marks)


def _in_blocks_forward(q_BTNH, k_BSKH, v_BSKH, marks, spec, platforms):
    out_BTNH, logsumexp_BTN = _dispatch("forward", spec, platforms, q_BTNH, k_BSKH, v_BSKH, marks)
    outputs = checkpoint_name(out_BTNH, RESIDUALS), checkpoint_name(logsumexp_BTN, RESIDUALS)
    return outputs, (q_BTNH, k_BSKH, v_BSKH, *outputs, marks)


def _in_blocks_backward(spec, platforms, residuals, cotangents):
    *arrays, marks = residuals
    return *_dispatch("backward", spec, platforms, *arrays, *cotangents, marks), None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _dispatch(direction: str, spec: Spec, platforms: tuple[str, ...], *arguments):
    """Chosen inside the custom gradient, so that all platforms share one set of residuals."""
    anywhere = functools.partial(getattr(blockwise, direction), spec=spec)
    if not platforms:
        return anywhere(*arguments)
    kernels = {name: functools.partial(getattr(KERNELS[name], direction), spec=spec) for name in platforms}
    return jax.lax.platform_dependent(*arguments, **kernels, default=anywhere)


def visible(q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, *, causal: bool) -> jax.Array:
    """Returns [B, T, S] bool: which key each query may see."""
    same = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    mask_BTS = same & (q_segment_ids_BT != 0)[:, :, None]
    if causal:
        mask_BTS &= kv_positions_BS[:, None, :] <= q_positions_BT[:, :, None]
    return mask_BTS


def _masks(marks: Marks, causal: bool, stride: int | None) -> jax.Array:
    """Returns [A, B, T, S] bool: which key each kind of query may see, no key by two kinds."""
    masks_ABTS = visible(*marks, causal=causal)[None]
    if stride is None:
        return masks_ABTS
    since_ABT, until_ABT = dual_chunk.windows(marks.q_positions_BT, stride)
    kv_1B1S = marks.kv_positions_BS[None, :, None, :]
    return masks_ABTS & (since_ABT[..., None] <= kv_1B1S) & (kv_1B1S <= until_ABT[..., None])


def _reference(q_ABTNH, k_BSKH, v_BSKH, masks_ABTS, scale):
    """All T x S logits at once, softmax in float32: the definition the other back ends are tested against."""
    A, B, T, N, H = q_ABTNH.shape
    K = k_BSKH.shape[2]
    q_ABTKGH = q_ABTNH.reshape(A, B, T, K, N // K, H)
    logits_ABKGTS = jnp.einsum("ABTKGH,BSKH->ABKGTS", q_ABTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    logits_BKGTS = jnp.sum(jnp.where(masks_ABTS[:, :, None, None], logits_ABKGTS, 0.0), axis=0)
    mask_B11TS = jnp.any(masks_ABTS, axis=0)[:, None, None]
    logits_BKGTS = jnp.where(mask_B11TS, logits_BKGTS, NEG_INF)
    peak_BKGT1 = jax.lax.stop_gradient(jnp.max(logits_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.where(mask_B11TS, jnp.exp(logits_BKGTS - peak_BKGT1), 0.0)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    # A row that sees no key sums to 0; its logsumexp is NEG_INF, the weight it has when outputs are merged.
    safe_BKGT1 = jnp.where(total_BKGT1 == 0.0, 1.0, total_BKGT1)
    probs_BKGTS = (weights_BKGTS / safe_BKGT1).astype(v_BSKH.dtype)
    out_BTNH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)
    logsumexp_BKGT = (peak_BKGT1 + jnp.log(safe_BKGT1))[..., 0]
    return out_BTNH.astype(q_ABTNH.dtype), jnp.moveaxis(logsumexp_BKGT.reshape(B, N, T), 1, 2)
