"""Experts on a TPU by megablox, JAX's own grouped matrix product: the same two functions as `ops.tiles`.

The gradient of the weights is its transposed product (tgmm): the gradient of `jax.lax.ragged_dot` would be dense over
the experts. What lies between the experts' parts is not computed, and nobody reads it.

Shapes: R tokens, D model width, F expert width, M places in the sorted order.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.ops.tiles import Groups, activation_vjp

TILE = 512  # rows and columns of one step of a product, at most


def forward(x_RD, token_M, groups: Groups, weights, *, interpret: bool = False):
    """As `ops.tiles.forward`; `interpret` runs the kernel anywhere, slowly."""
    gate_EDF, up_EDF, down_EFD = weights
    product = functools.partial(_product, sizes_E=groups.sizes, interpret=interpret)
    x_MD = x_RD.at[token_M].get(mode="clip")
    gate_MF, up_MF = product(x_MD, gate_EDF), product(x_MD, up_EDF)
    return gate_MF, up_MF, product((jax.nn.silu(gate_MF) * up_MF).astype(x_RD.dtype), down_EFD)


def backward(x_RD, dout_RD, token_M, gate_M, groups: Groups, gate_MF, up_MF, weights, *, interpret: bool = False):
    """As `ops.tiles.backward`."""
    gate_EDF, up_EDF, down_EFD = weights
    dtype = x_RD.dtype
    product = functools.partial(_product, sizes_E=groups.sizes, interpret=interpret, transposed=True)
    x_MD, dout_MD = (rows.at[token_M].get(mode="clip") for rows in (x_RD, dout_RD))
    h_MF, dh_to = activation_vjp(gate_MF, up_MF)
    raw_MF = product(dout_MD, down_EFD).astype(jnp.float32)
    dgate_MF, dup_MF = (d.astype(dtype) for d in dh_to(raw_MF * gate_M[:, None]))
    dx_MD = product(dgate_MF, gate_EDF) + product(dup_MF, up_EDF)
    weighted_MF = (h_MF * gate_M[:, None]).astype(dtype)
    dweights = (
        _weight_gradient(rows, d, groups.sizes, interpret)
        for rows, d in ((x_MD, dgate_MF), (x_MD, dup_MF), (weighted_MF, dout_MD))
    )
    return dx_MD, jnp.sum(raw_MF * h_MF, axis=1), tuple(dweights)


def _product(rows, weights, *, sizes_E, interpret, transposed=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    inner, outer = weights.shape[1:][::-1] if transposed else weights.shape[1:]
    tiling = _tile(rows.shape[0]), _tile(inner), _tile(outer)
    return gmm(rows, weights, sizes_E, rows.dtype, tiling, transpose_rhs=transposed, interpret=interpret)


def _weight_gradient(rows, gradient, sizes_E, interpret):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tile(rows.shape[0]), _tile(rows.shape[1]), _tile(gradient.shape[1])
    return tgmm(rows.T, gradient, sizes_E, jnp.float32, tiling, interpret=interpret)


def _tile(size: int) -> int:
    """The whole axis if it is short; else the largest multiple of 128 up to TILE that divides it; else TILE."""
    whole = [tile for tile in range(TILE, 128, -128) if size % tile == 0]
    return size if size <= TILE else next(iter(whole), TILE)
