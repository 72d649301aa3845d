"""Frozen kernels in four or eight bits, for LoRA beside them (QLoRA, arXiv:2305.14314).

A kernel W [*S, *in, *out] (S: axes that are stacked, layers first) is stored as codes and float32 scales, arrays of as
many axes as the kernel; W is about value(code) x scale.

"nf4": a code is the nearest of 16 quantiles of the normal distribution (section 3, appendix E), a scale the largest
magnitude of 64 values along the last input axis: 4.5 bits a value. Two codes share a uint8, one of the first half of
their 64 and one of the second: codes [..., in / 2, ...], scales [..., in / 64, ...]. (JAX's uint4 cannot be an argument
of a program that was compiled ahead, on a CPU.) The scales are not quantised once more, which saves another 0.37 bits.

"int8": 255 even steps, a scale for each output: codes of the kernel's shape, scales [*S, 1, *out].
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError

KINDS = ("int8", "nf4")
BLOCK = 64  # values of an nf4 scale, where the axis is a multiple; else the largest common divisor
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantise(kernel: jax.Array, kind: str, *, stacked: int, inputs: int) -> dict[str, jax.Array]:
    """Returns {"codes", "scales"} of a kernel.

    Each value is off by at most its scale times half the widest gap between two levels: 0.152 of "nf4", 0.5 of "int8".

    Args:
      kernel: [*S, *in, *out], floats.
      kind: one of KINDS.
      stacked: how many axes S are.
      inputs: how many axes are inputs.

    Raises:
      InputError: where the last input axis of an nf4 kernel is no multiple of 4.
    """
    kernel = kernel.astype(jnp.float32)
    if kind == "nf4":
        return _quantise_nf4(kernel, stacked + inputs - 1)
    peak = jnp.max(jnp.abs(kernel), axis=tuple(range(stacked, stacked + inputs)), keepdims=True)
    scales = jnp.where(peak == 0, 1.0, peak / 127)
    return {"codes": jnp.round(kernel / scales).astype(jnp.int8), "scales": scales}


def _quantise_nf4(kernel: jax.Array, axis: int) -> dict[str, jax.Array]:
    shape, size = kernel.shape, kernel.shape[axis]
    block = math.gcd(size, BLOCK)
    if block < 4:
        raise InputError(f"a kernel {list(shape)} cannot be nf4: axis {axis} is {size}; expected a multiple of 4")
    cut = kernel.reshape(*shape[:axis], size // block, block, *shape[axis + 1 :])
    peak = jnp.max(jnp.abs(cut), axis=axis + 1, keepdims=True)
    scales = jnp.where(peak == 0, 1.0, peak)
    middles = [(low + high) / 2 for low, high in zip(NF4[:-1], NF4[1:], strict=True)]
    codes = sum((cut / scales > middle).astype(jnp.uint8) for middle in middles)
    first, second = jnp.split(codes, 2, axis=axis + 1)
    packed = (first | (second << 4)).reshape(*shape[:axis], size // 2, *shape[axis + 1 :])
    return {"codes": packed, "scales": jnp.squeeze(scales, axis + 1)}


def dequantise(codes: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Returns the kernel that codes and scales stand for, in this dtype."""
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scales).astype(dtype)
    shape = codes.shape
    axis = next(axis for axis, sizes in enumerate(zip(shape, scales.shape, strict=True)) if sizes[0] != sizes[1])
    blocks = scales.shape[axis]
    pairs = codes.reshape(*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
    values = jnp.array(NF4)[jnp.concatenate([pairs & 15, pairs >> 4], axis=axis + 1)]
    whole = values * jnp.expand_dims(scales, axis + 1)
    return whole.reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]).astype(dtype)


def product(spec: str, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns einsum(spec, x, kernel). The backward pass makes the kernel again: what is kept for it is the codes."""

    @jax.checkpoint
    def of_codes(x, codes, scales):
        return jnp.einsum(spec, x, dequantise(codes, scales, x.dtype))

    return of_codes(x, codes, scales)


def quantise_tree(params: dict, kind: str, inputs: dict[str, int], *, stacked: int = 1) -> dict:
    """Returns the parameters with codes and scales in the place of the kernels of the layers in `inputs`.

    Args:
      params: of a model.
      kind: one of KINDS.
      inputs: names of layers, and how many axes of their kernels are inputs.
      stacked: how many axes come before these.
    """
    found = {}
    for name, part in params.items():
        if isinstance(part, dict):
            found[name] = quantise_tree(part, kind, inputs, stacked=stacked)
            if name in inputs and "kernel" in part:
                kernel = found[name].pop("kernel")
                found[name] |= quantise(kernel, kind, stacked=stacked, inputs=inputs[name])
        else:
            found[name] = part
    return found


def dequantise_tree(params: dict, dtype=jnp.float32) -> dict:
    """Returns the parameters with kernels again, all other leaves as they are."""
    found = {name: dequantise_tree(part, dtype) if isinstance(part, dict) else part for name, part in params.items()}
    if "codes" in found:
        found["kernel"] = dequantise(found.pop("codes"), found.pop("scales"), dtype)
    return found
