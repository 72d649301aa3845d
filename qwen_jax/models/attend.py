"""Attention on a mesh: each device attends with its share of the rows, heads and queries to all keys of its rows.

Where a sequence is split (context parallelism), keys and values are gathered one layer at a time, and again for the
backward pass, which reduces and scatters their gradient: of the length, a device keeps its own part only.

Of causal attention, a late part of a sequence is more work than an early one. So each device trades the second half of
its queries with the device that mirrors it, the first with the last, and so on: of the 2n halves device i computes 2i
and 2n - 1 - 2i, which is the same work everywhere. Halves are sent there and their outputs back; nothing else of the
model knows of it.

Shapes: A kinds of queries, B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qwen_jax.ops.attention import RESIDUALS, attention
from qwen_jax.sharding import Layout

TRADED = "traded queries"  # checkpoint name


def attend(
    q_BTNH, k_BSKH, v_BSKH, marks, *, backend: str, layout: Layout, stride: int | None = None, cached: bool = False
) -> jax.Array:
    """Runs `ops.attention` by hand-written `shard_map` over batch, length and heads.

    The compiler cannot split a kernel, nor the loops of `blockwise` along the queries: it would run them whole on every
    device.

    Args:
      q_BTNH, k_BSKH, v_BSKH: as in `ops.attention`, with a stride q_ABTNH.
      marks: q positions [B, T], kv positions [B, S], q segment ids [B, T], kv segment ids [B, S].
      backend, stride: of `ops.attention`.
      layout: mesh and rules.
      cached: keys are those of a cache, whole in length; otherwise they are split like the queries.

    Returns:
      out_BTNH.
    """
    how = dict(backend=backend, stride=stride)
    # Heads that are split otherwise than the kv heads they read cannot be told apart locally.
    if layout.mesh is None or layout.rules.heads != layout.rules.kv_heads:
        return _local(q_BTNH, k_BSKH, v_BSKH, *marks, **how)
    rules = layout.rules
    rows = rules.spec(("batch", "length", "heads", "head_dim"))
    keys = rules.spec(("batch", None if cached else "length", "kv_heads", "head_dim"))
    q_marks, kv_marks = PartitionSpec(*rows[:2]), PartitionSpec(*keys[:2])
    queries = rows if stride is None else PartitionSpec(None, *rows)
    local = functools.partial(_local, **how)
    if not cached and layout.size("length") > 1:
        local = _over_length(local, rules.length, layout.size("length"))
    split = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(queries, keys, keys, q_marks, kv_marks, q_marks, kv_marks), out_specs=rows
    )
    return split(q_BTNH, k_BSKH, v_BSKH, *marks)


def _over_length(local, axes: tuple[str, ...], parts: int):
    """Returns `local` for a device that has one of `parts` parts of queries, keys and marks."""

    def balanced(q_BTNH, k_BSKH, v_BSKH, *marks):
        q_marks, kv_marks = marks[0::2], marks[1::2]
        gather = lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True)
        trade = lambda x, axis: trade_halves(x, axis, axes, parts)
        q_BTNH = checkpoint_name(trade(q_BTNH, -3), TRADED)
        (q_positions, q_ids), (kv_positions, kv_ids) = (trade(x, 1) for x in q_marks), (gather(x) for x in kv_marks)
        out_BTNH = local(q_BTNH, gather(k_BSKH), gather(v_BSKH), q_positions, kv_positions, q_ids, kv_ids)
        return trade(out_BTNH, 1)

    # Whole keys are held by no layer for its backward pass. Recomputing is not kept apart from the first time: layers
    # are loops, whose passes the compiler cannot join; and where a layer is recomputed as a whole, one gather will do.
    policy = jax.checkpoint_policies.save_only_these_names(RESIDUALS, TRADED)
    return jax.checkpoint(balanced, policy=policy, prevent_cse=False)


def trade_halves(x: jax.Array, axis: int, axes: tuple[str, ...], parts: int) -> jax.Array:
    """Gives the second half of x along `axis` for that of the mirrored device; done twice, it is undone."""
    size = x.shape[axis]
    own, given = jnp.split(x, [size - size // 2], axis=axis)
    taken = jax.lax.ppermute(given, axes, [(i, parts - 1 - i) for i in range(parts)])
    return jnp.concatenate([own, taken], axis=axis)


def _local(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, **how):
    return attention(
        q_BTNH, k_BSKH, v_BSKH, q_positions_BT=q_positions_BT, kv_positions_BS=kv_positions_BS,
        q_segment_ids_BT=q_segment_ids_BT, kv_segment_ids_BS=kv_segment_ids_BS, **how,
    )[0]  # fmt: skip
