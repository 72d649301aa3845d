"""Attention on a mesh: each device attends with its own rows and heads to all keys of its rows.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from qwen_jax.ops.attention import attention
from qwen_jax.sharding import Layout


def attend(q_BTNH, k_BSKH, v_BSKH, marks, *, backend: str, layout: Layout, stride: int | None = None) -> jax.Array:
    """Runs `ops.attention` by hand-written `shard_map` over batch, queries' length and heads.

    The compiler cannot split a kernel, nor the loops of `blockwise` along the queries: it would run them whole on every
    device. Nothing is exchanged here but the keys' gradient, summed over the axes that split the queries.

    Args:
      q_BTNH, k_BSKH, v_BSKH: as in `ops.attention`, with a stride q_ABTNH; keys are whole in length.
      marks: q positions [B, T], kv positions [B, S], q segment ids [B, T], kv segment ids [B, S].
      backend, stride: of `ops.attention`.
      layout: mesh and rules.

    Returns:
      out_BTNH.
    """
    local = functools.partial(_local, backend=backend, stride=stride)
    # Heads that are split otherwise than the kv heads they read cannot be told apart locally.
    if layout.mesh is None or layout.rules.heads != layout.rules.kv_heads:
        return local(q_BTNH, k_BSKH, v_BSKH, *marks)
    rows = layout.rules.spec(("batch", "length", "heads", "head_dim"))
    keys = layout.rules.spec(("batch", None, "kv_heads", "head_dim"))
    q_marks, kv_marks = PartitionSpec(*rows[:2]), PartitionSpec(*keys[:2])
    queries = rows if stride is None else PartitionSpec(None, *rows)
    split = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(queries, keys, keys, q_marks, kv_marks, q_marks, kv_marks), out_specs=rows
    )
    return split(q_BTNH, k_BSKH, v_BSKH, *marks)


def _local(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, **how):
    return attention(
        q_BTNH, k_BSKH, v_BSKH, q_positions_BT=q_positions_BT, kv_positions_BS=kv_positions_BS,
        q_segment_ids_BT=q_segment_ids_BT, kv_segment_ids_BS=kv_segment_ids_BS, **how,
    )[0]  # fmt: skip
