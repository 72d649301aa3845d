"""Experts on several devices: rows travel to the devices that hold their experts, and back (all-to-all), in rounds.

Shapes are static, loads are not. A round has room for so many rows for each device, a little more than an even load
needs; while any device has rows left, all take another round. No row is dropped, and an uneven load costs time, not
memory: buffers are ROOM times an even load however uneven it is. The first round keeps its activations for the backward
pass; further ones, which balanced routers do not need, compute theirs again.

Shapes: R tokens of this device, K experts per token, D model width, P devices along the axis, C room of a round.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.ops.experts import Weights, experts

ROOM = 1.25  # of a round, relative to an even load


class Queue(NamedTuple):
    """Pairs (token, choice) in the order of their devices.

    Attributes:
      pair_N: int32 token * K + choice, sorted by device.
      first_P, count_P: int32 each device's part of it.
      expert_RK: int32, number of the expert on its device.
      device_RK: int32, P for pairs that go to nobody.
      rank_RK: int32 place of each pair in its device's part.
    """

    pair_N: jax.Array
    first_P: jax.Array
    count_P: jax.Array
    expert_RK: jax.Array
    device_RK: jax.Array
    rank_RK: jax.Array


def exchanged_experts(
    x_RD: jax.Array,
    gates_RK: jax.Array,
    experts_RK: jax.Array,
    weights: Weights,
    *,
    axis: str,
    lockstep: tuple[str, ...],
    room: float = ROOM,
) -> jax.Array:
    """As `ops.experts.experts`, inside a `shard_map` over whose mesh axis `axis` the experts are split.

    Args:
      x_RD, gates_RK: this device's tokens and gates.
      experts_RK: int32 numbers of all devices' experts; as many as there are is nobody.
      weights: this device's experts, the i-th part along the axis.
      axis: mesh axis.
      lockstep: mesh axes along which all take the same number of rounds.
      room: rows for each device in a round, relative to an even load.
    """
    P, (R, K), count = jax.lax.axis_size(axis), experts_RK.shape, weights.gate.shape[0]
    C = min(math.ceil(room * R * K / P), R * min(K, count))
    queue = _queue(experts_RK, P, count)
    most = jax.lax.pmax(jnp.max(queue.count_P), lockstep)
    one = functools.partial(_round, axis=axis, C=C)
    out_RD = one(jnp.int32(0), x_RD, gates_RK, weights, queue)
    return out_RD + _further_rounds(one, x_RD, gates_RK, weights, queue, -(-most // C))


def _queue(experts_RK: jax.Array, P: int, experts_per_device: int) -> Queue:
    device_RK = experts_RK // experts_per_device
    device_N = device_RK.reshape(-1)
    N = device_N.size
    pair_N = jnp.argsort(device_N, stable=True).astype(jnp.int32)
    first = jnp.searchsorted(device_N[pair_N], jnp.arange(P + 1), side="left").astype(jnp.int32)
    rank_N = jnp.arange(N, dtype=jnp.int32) - first[device_N[pair_N]]
    rank_RK = jnp.zeros(N, jnp.int32).at[pair_N].set(rank_N, unique_indices=True).reshape(experts_RK.shape)
    return Queue(pair_N, first[:-1], first[1:] - first[:-1], experts_RK % experts_per_device, device_RK, rank_RK)


def _round(index, x_RD, gates_RK, weights, queue: Queue, *, axis: str, C: int) -> jax.Array:
    """Returns what pairs number index * C … (index + 1) * C - 1 of each device's part add to the output."""
    (R, K), P, count = gates_RK.shape, queue.first_P.size, weights.gate.shape[0]
    rank_C = index * C + jnp.arange(C, dtype=jnp.int32)
    there_PC = rank_C[None, :] < queue.count_P[:, None]
    pair_PC = queue.pair_N.at[queue.first_P[:, None] + rank_C[None, :]].get(mode="clip")
    pair_PC = jnp.where(there_PC, pair_PC, R * K)
    rows_PCD = x_RD.at[pair_PC // K].get(mode="fill", fill_value=0)
    expert_PC = queue.expert_RK.reshape(-1).at[pair_PC].get(mode="fill", fill_value=count)
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    rows_RD, expert_R1 = swap(rows_PCD).reshape(P * C, -1), swap(expert_PC).reshape(P * C, 1)
    done_RD = experts(rows_RD, jnp.ones(expert_R1.shape, jnp.float32), expert_R1, weights)
    back_MD = swap(done_RD.reshape(rows_PCD.shape)).reshape(P * C, -1)
    rank_RK = queue.rank_RK - index * C
    here_RK = (rank_RK >= 0) & (rank_RK < C) & (queue.device_RK < P)
    place_RK = jnp.where(here_RK, queue.device_RK * C + rank_RK, P * C)
    out_RD = 0.0
    for k in range(K):
        out_RD += gates_RK[:, k, None] * back_MD.at[place_RK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
    return out_RD.astype(x_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(one, x_RD, gates_RK, weights, queue, rounds):
    """Sums rounds 1, 2, …; a loop of unknown length has no gradient of its own."""
    add = lambda index, out_RD: out_RD + one(index, x_RD, gates_RK, weights, queue)
    return jax.lax.fori_loop(1, rounds, add, jnp.zeros_like(x_RD))


def _further_forward(one, *arguments):
    return _further_rounds(one, *arguments), arguments


def _further_backward(one, arguments, dout_RD):
    *primals, queue, rounds = arguments

    def add(index, gradients):
        pull = jax.vjp(lambda *primals: one(index, *primals, queue), *primals)[1]
        return jax.tree.map(jnp.add, gradients, pull(dout_RD))

    gradients = jax.lax.fori_loop(1, rounds, add, jax.tree.map(jnp.zeros_like, tuple(primals)))
    return *gradients, None, None


_further_rounds.defvjp(_further_forward, _further_backward)
