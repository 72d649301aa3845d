"""Dropless mixture of experts: sort by expert, one matrix product after the other over each expert's rows, sort back.

Every (token, expert) pair is computed, none is dropped and nothing of the size [tokens, experts, ...] exists. Two back
ends run the products, chosen where the program is compiled: `kernels.gmm_tpu` on a TPU, else `tiles`. Like kernels of
attention they cannot be split over a mesh by the compiler: on more than one device call this in `shard_map`, with
check_vma=False, for the TPU kernel does not say over which mesh axes its results vary.

Shapes: R tokens, K experts per token, E experts, D model width, F expert width, M places in the sorted order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.ops import tiles
from qwen_jax.ops.kernels import gmm_tpu
from qwen_jax.ops.tiles import ALIGNMENT, Groups

LARGE = 512  # places; a multiple of the TPU kernel's tile wherever there are more


class Weights(NamedTuple):
    """gate, up: [E, D, F]; down: [E, F, D]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def experts(x_RD: jax.Array, gates_RK: jax.Array, experts_RK: jax.Array, weights: Weights) -> jax.Array:
    """Returns sum_k gates[r, k] * expert_k(x[r]), expert(x) = down(silu(gate(x)) * up(x)).

    Args:
      x_RD: tokens.
      gates_RK: float.
      experts_RK: int32 in [0, E]; E is nobody: computed by no expert, worth 0.
      weights: cast to the type of x; products accumulate in float32.

    Returns:
      out_RD in the type of x.
    """
    weights = Weights(*(w.astype(x_RD.dtype) for w in weights))
    return _experts(x_RD, gates_RK.astype(jnp.float32), experts_RK, weights)


class Order(NamedTuple):
    """Pairs (token, choice) sorted by expert; each expert's places begin on a multiple of ALIGNMENT.

    Attributes:
      token_M: int32 the token at each place; R at places between the experts' parts.
      pair_M: int32 token * K + choice, R * K at such places.
      place_RK: int32 where each pair is; M for pairs that go to nobody.
      groups: each expert's places.
    """

    token_M: jax.Array
    pair_M: jax.Array
    place_RK: jax.Array
    groups: Groups


def order_by_expert(experts_RK: jax.Array, num_experts: int) -> Order:
    """Sorts pairs by expert, keeping the tokens' order within each."""
    R, K = experts_RK.shape
    pairs, E = R * K, num_experts
    expert_N = experts_RK.reshape(pairs)
    sorted_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    first_E = jnp.searchsorted(expert_N[sorted_N], jnp.arange(E + 1), side="left").astype(jnp.int32)
    counts_E = first_E[1:] - first_E[:-1]
    sizes_E = -(-counts_E // ALIGNMENT) * ALIGNMENT
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    M = _places(pairs, E)
    shift_E = jnp.append(starts_E - first_E[:-1], M)  # nobody's pairs land at M or behind, out of range
    place_N = jnp.arange(pairs, dtype=jnp.int32) + shift_E[expert_N[sorted_N]].astype(jnp.int32)
    pair_M = jnp.full(M, pairs, jnp.int32).at[place_N].set(sorted_N, mode="drop", unique_indices=True)
    place_of_N = jnp.zeros(pairs, jnp.int32).at[sorted_N].set(jnp.minimum(place_N, M), unique_indices=True)
    return Order(pair_M // K, pair_M, place_of_N.reshape(R, K), Groups(starts_E, sizes_E))


def _places(pairs: int, num_experts: int) -> int:
    """M: room for every pair and for what alignment leaves empty behind each expert that has any."""
    most = pairs + min(pairs, num_experts) * (ALIGNMENT - 1)
    multiple = ALIGNMENT if most <= LARGE else LARGE
    return -(-most // multiple) * multiple


@jax.custom_vjp
def _experts(x_RD, gates_RK, experts_RK, weights):
    return _forward(x_RD, gates_RK, experts_RK, weights)[0]


def _forward(x_RD, gates_RK, experts_RK, weights):
    order = order_by_expert(experts_RK, weights.gate.shape[0])
    gate_MF, up_MF, y_MD = jax.lax.platform_dependent(
        x_RD, order.token_M, order.groups, weights, tpu=gmm_tpu.forward, default=tiles.forward
    )
    out_RD = _collect(y_MD, order.place_RK, gates_RK).astype(x_RD.dtype)
    return out_RD, (x_RD, gates_RK, order, gate_MF, up_MF, weights)


def _backward(residuals, dout_RD):
    # d gate is <dout, y>, taken as <dout . down^T, h> so that y, the largest array here, need not be kept.
    x_RD, gates_RK, order, gate_MF, up_MF, weights = residuals
    gate_M = gates_RK.reshape(-1).at[order.pair_M].get(mode="fill", fill_value=0.0)
    dx_MD, dgate_M, dweights = jax.lax.platform_dependent(
        x_RD, dout_RD, order.token_M, gate_M, order.groups, gate_MF, up_MF, weights,
        tpu=gmm_tpu.backward, default=tiles.backward,
    )  # fmt: skip
    dx_RD = _collect(dx_MD, order.place_RK).astype(x_RD.dtype)
    dgates_RK = dgate_M.at[order.place_RK].get(mode="fill", fill_value=0.0)
    return dx_RD, dgates_RK, None, Weights(*(dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)))


_experts.defvjp(_forward, _backward)


def _collect(rows_MD: jax.Array, place_RK: jax.Array, gates_RK: jax.Array | None = None) -> jax.Array:
    """Adds up each token's rows in float32, weighted; gathers only, one choice of K at a time."""
    total_RD = 0.0
    for k in range(place_RK.shape[1]):
        row_RD = rows_MD.at[place_RK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total_RD += row_RD if gates_RK is None else row_RD * gates_RK[:, k, None]
    return total_RD
