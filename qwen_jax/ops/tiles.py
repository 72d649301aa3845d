"""Experts by tiles: each tile is some rows of one expert, so that only chosen experts are computed, on any platform.

(`jax.lax.ragged_dot` multiplies every row by every expert where there is no kernel for it.) An expert's rows are cut
into as few tiles of the sizes of SIZES as will do, and a loop that runs as often as there are tiles takes one size
after the other: each tile reads its expert's weights once. How many tiles there are is known at run time only; how many
rows beyond the chosen pairs they may hold is bounded by ALIGNMENT - 1 for each expert.

Shapes: R tokens, E experts, D model width, F expert width, M places in the sorted order, C rows of one tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGNMENT = 16  # rows: the smallest tile; each expert's part begins on a multiple
# Large tiles share the reading of weights and the adding up of their gradients among many rows. Measured on two cores
# (512 x 352, 32 experts, 256 rows each): 128 and 16 alone take 1.1 times as long; all 32 multiples of 16 take 0.95, and
# four times as long to compile.
SIZES = (512, 256, 128, 64, 32, 16)


class Groups(NamedTuple):
    """Each expert's places: [E] int32 first place and number of places, both multiples of ALIGNMENT."""

    starts: jax.Array
    sizes: jax.Array


def forward(x_RD, token_M, groups: Groups, weights):
    """Runs every expert on its rows.

    Args:
      x_RD: tokens.
      token_M: int32 the token at each place; where none is, anything: what is computed there means nothing.
      groups: places of each expert.
      weights: (gate_EDF, up_EDF, down_EFD) in the type of x.

    Returns:
      gate_MF, up_MF before the activation, y_MD, in the type of x.
    """
    (M,), (_, D, F) = token_M.shape, weights[0].shape

    def tile(expert, start, C, state):
        gate_DF, up_DF, down_FD = (_of(w, expert) for w in weights)
        x_CD = _rows(x_RD, _cut(token_M, start, C))
        gate_CF, up_CF = _product("CD,DF->CF", x_CD, gate_DF), _product("CD,DF->CF", x_CD, up_DF)
        h_CF = (jax.nn.silu(gate_CF) * up_CF).astype(x_RD.dtype)
        new = gate_CF, up_CF, _product("CF,FD->CD", h_CF, down_FD)
        return tuple(_put(into, part, start) for into, part in zip(state, new, strict=True))

    empty = tuple(jnp.zeros((M, width), x_RD.dtype) for width in (F, F, D))
    return each_tile(groups, M, tile, empty)


def backward(x_RD, dout_RD, token_M, gate_M, groups: Groups, gate_MF, up_MF, weights):
    """Gradients of sum_m gate[m] * <dout[token[m]], y[m]>.

    Args:
      x_RD, token_M, groups, weights: as in `forward`, which returned gate_MF and up_MF.
      dout_RD: gradient of each token's output.
      gate_M: float32 weight of each place, 0 where no token is.

    Returns:
      dx_MD in the type of x; dgate_M float32; the weights' gradients in float32.
    """
    (M,), dtype = token_M.shape, x_RD.dtype

    def tile(expert, start, C, state):
        dx_MD, dgate_M, *dweights = state
        gate_DF, up_DF, down_FD = (_of(w, expert) for w in weights)
        token_C, weight_C1 = _cut(token_M, start, C), _cut(gate_M, start, C)[:, None]
        x_CD, dout_CD = _rows(x_RD, token_C), _rows(dout_RD, token_C)
        h_CF, dh_to = activation_vjp(_cut(gate_MF, start, C), _cut(up_MF, start, C))
        raw_CF = _product("CD,FD->CF", dout_CD, down_FD)
        dgate_CF, dup_CF = (d.astype(dtype) for d in dh_to(raw_CF * weight_C1))
        dx_CD = _product("CF,DF->CD", dgate_CF, gate_DF) + _product("CF,DF->CD", dup_CF, up_DF)
        new = (
            _product("CD,CF->DF", x_CD, dgate_CF),
            _product("CD,CF->DF", x_CD, dup_CF),
            _product("CF,CD->FD", (h_CF * weight_C1).astype(dtype), dout_CD),
        )
        dweights = (_add(into, part, expert) for into, part in zip(dweights, new, strict=True))
        return _put(dx_MD, dx_CD, start), _put(dgate_M, jnp.sum(raw_CF * h_CF, axis=1), start), *dweights

    empty = jnp.zeros((M, x_RD.shape[1]), dtype), jnp.zeros((M,), jnp.float32)
    dx_MD, dgate_M, *dweights = each_tile(
        groups, M, tile, (*empty, *(jnp.zeros(w.shape, jnp.float32) for w in weights))
    )
    return dx_MD, dgate_M, tuple(dweights)


def activation_vjp(gate_CF: jax.Array, up_CF: jax.Array):
    """Returns silu(gate) * up in float32, and the function from its gradient to those of gate and up."""
    return jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_CF.astype(jnp.float32), up_CF.astype(jnp.float32))


def each_tile(groups: Groups, M: int, tile, state):
    """Folds tile(expert, start, C, state) over all tiles: of each expert as many of the largest size as it has, …

    Sizes over twice an even load's are left out: most experts would have none of them, and each is a loop to compile.
    """
    starts_E, left_E = groups
    largest = min(M, max(ALIGNMENT, 2 * M // starts_E.size))
    for C in (size for size in SIZES if size <= largest):
        tiles_E = left_E // C
        ends_E = jnp.cumsum(tiles_E)

        def one(i, state, C=C, starts_E=starts_E, tiles_E=tiles_E, ends_E=ends_E):
            expert = jnp.sum(ends_E <= i)
            index = i - (ends_E[expert] - tiles_E[expert])
            return tile(expert, starts_E[expert] + index * C, C, state)

        state = jax.lax.fori_loop(0, ends_E[-1], one, state)
        starts_E, left_E = starts_E + tiles_E * C, left_E - tiles_E * C
    return state


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _of(w: jax.Array, expert) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)


def _rows(x_RD: jax.Array, token_C: jax.Array) -> jax.Array:
    return x_RD.at[token_C].get(mode="clip")


def _cut(x: jax.Array, start, C: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, C)


def _put(into: jax.Array, part: jax.Array, start) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, part.astype(into.dtype), start, axis=0)


def _add(into: jax.Array, part: jax.Array, expert) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(into, _of(into, expert) + part, expert, axis=0)
