"""Frozen kernels in four or eight bits, for LoRA beside them (QLoRA, arXiv:2305.14314).

A kernel W [*S, *in, *out] (S: axes that are stacked, layers first) is stored as

    codes    the kernel's shape, uint4 or int8
    scales   float32, as many axes; W is about value(codes) x scales, each scale for a block of neighbouring values.

"nf4": a code is the nearest of 16 quantiles of the normal distribution (section 3, appendix E), a scale the largest
magnitude of 64 values along the last input axis: 4.5 bits a value. The scales are not quantised once more, which saves
another 0.37 bits. "int8": 255 even steps, a scale for each output.
"""

import math

import jax
import jax.numpy as jnp

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
    """
    kernel = kernel.astype(jnp.float32)
    axes = tuple(range(stacked, stacked + inputs))
    blocks = [1 if axis in axes else size for axis, size in enumerate(kernel.shape)]
    if kind == "nf4":
        last = axes[-1]
        blocks = [*kernel.shape[:last], kernel.shape[last] // math.gcd(kernel.shape[last], BLOCK)]
        blocks += kernel.shape[last + 1 :]
    cut = _cut(kernel, blocks)
    peak = jnp.max(jnp.abs(cut), axis=tuple(range(1, cut.ndim, 2)), keepdims=True)
    steps = 1.0 if kind == "nf4" else 127.0
    scales = jnp.where(peak == 0, 1.0, peak / steps)
    levels = cut / scales
    if kind == "nf4":
        middles = [(low + high) / 2 for low, high in zip(NF4[:-1], NF4[1:], strict=True)]
        codes = sum((levels > middle).astype(jnp.int32) for middle in middles).astype(jnp.uint4)
    else:
        codes = jnp.round(levels).astype(jnp.int8)
    return {"codes": codes.reshape(kernel.shape), "scales": scales.reshape(blocks)}


def dequantise(codes: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Returns the kernel that codes and scales stand for, in this dtype."""
    values = _nf4_values(codes) if codes.dtype == jnp.uint4 else codes.astype(jnp.float32)
    cut = _cut(values, scales.shape)
    scales = scales.reshape([size for count in scales.shape for size in (count, 1)])
    return (cut * scales).reshape(codes.shape).astype(dtype)


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


def _cut(x: jax.Array, blocks) -> jax.Array:
    """Cuts each axis into its blocks: [a, b] into [blocks_a, a / blocks_a, blocks_b, b / blocks_b]."""
    return x.reshape([part for size, count in zip(x.shape, blocks, strict=True) for part in (count, size // count)])


def _nf4_values(codes: jax.Array) -> jax.Array:
    """A tree of selections by the code's bits: element by element, so the result lies on the mesh as the codes do."""
    bits, values = codes.astype(jnp.int32), list(NF4)
    for place in range(4):
        odd = (bits >> place) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(jnp.float32)
