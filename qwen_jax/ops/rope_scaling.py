"""RoPE beyond the length of training: YaRN, Qwen v1's dynamic NTK and LogN, the temperature of Qwen2.5-1M.

All of them come down to the tables of cos and sin that queries and keys are rotated by: other frequencies, other
positions, or a factor that grows with the length. `rotation` makes those tables; what is below it is its parts.

Some depend on how long the text is. That is told per token by `lengths`: the length of what was read in one go together
with it, the prompt. A document read whole is its own prompt. An answer decoded token by token keeps the prompt's length
(dynamic NTK), or grows beyond it by its own position (temperature); so a decode step is the full forward at that
position given the same `lengths`, and no cached key is ever out of date.

Shapes: B batch, T length, N heads, H head dim; A kinds of keys of `ops.dual_chunk`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.long_context import DualChunk, V1Lengths, Yarn
from qwen_jax.ops import dual_chunk, rope


class Rotation(NamedTuple):
    """Tables of cos and sin, float32: [B, T, H/2], those of queries [A, B, T, H/2] with dual chunks."""

    q_cos: jax.Array
    q_sin: jax.Array
    k_cos: jax.Array
    k_sin: jax.Array

    def queries(self, q_BTNH: jax.Array) -> jax.Array:
        """Returns rotated queries [B, T, N, H], with dual chunks [A, B, T, N, H]."""
        if self.q_cos.ndim == 3:
            return rope.rotate(q_BTNH, self.q_cos, self.q_sin)
        # Not by vmap: its gradient is a sum over a leading axis of three, on which XLA:CPU spends 50 times as long.
        kinds = zip(self.q_cos, self.q_sin, strict=True)
        return jnp.stack([rope.rotate(q_BTNH, cos, sin) for cos, sin in kinds])

    def keys(self, k_BTKH: jax.Array) -> jax.Array:
        """Returns rotated keys."""
        return rope.rotate(k_BTKH, self.k_cos, self.k_sin)


def rotation(
    positions_BT: jax.Array,
    lengths_BT: jax.Array,
    *,
    head_dim: int,
    theta: float,
    yarn: Yarn,
    chunks: DualChunk,
    v1: V1Lengths,
) -> Rotation:
    """Returns the tables of all tokens.

    Args:
      positions_BT: int32 position of each token in its document.
      lengths_BT: int32 length of the prompt of each token's document; the document's own where it is read whole.
      head_dim: H.
      theta: RoPE's base.
      yarn, chunks, v1: what is on; at most one of them.
    """
    frequencies, factor = yarn_frequencies(head_dim, theta, yarn)
    if v1.use_dynamic_ntk:
        frequencies = ntk_frequencies(frequencies, ntk_alpha(lengths_BT, v1.seq_length))
    if chunks.on:
        k_positions, q_positions = (
            f(positions_BT, chunks) for f in (dual_chunk.key_positions, dual_chunk.query_positions)
        )
        k_tables, q_tables = (rope.tables(x, frequencies) for x in (k_positions, q_positions))
    else:
        k_tables = q_tables = rope.tables(positions_BT, frequencies)
    if factor != 1.0:
        k_tables, q_tables = _scaled(k_tables, factor), _scaled(q_tables, factor)
    if chunks.on and chunks.original_max_position_embeddings:
        lengths_BT = jnp.maximum(lengths_BT, positions_BT + 1)
        m_BT1 = temperature(lengths_BT, chunks.original_max_position_embeddings)[..., None]
        k_tables, q_tables = _scaled(k_tables, m_BT1), _scaled(q_tables, m_BT1[None])
    if v1.use_logn_attn:
        q_tables = _scaled(q_tables, logn(positions_BT, v1.seq_length)[..., None])
    return Rotation(*q_tables, *k_tables)


def _scaled(tables, factor):
    return tuple(x * factor for x in tables)


def yarn_frequencies(head_dim: int, theta: float, yarn: Yarn) -> tuple[np.ndarray, float]:
    """Returns the frequencies of YaRN, [H/2] float, and what cos and sin are multiplied by.

    The published code's ramp, linear in the index of the pair, not the paper's, linear in the number of turns.
    """
    plain = rope.frequencies(head_dim, theta)
    if not yarn.on:
        return plain, 1.0

    def pair_that_turns(times: float) -> float:
        """The index of the pair that turns so often within the length of training."""
        turn = yarn.original_max_position_embeddings / (2 * math.pi * times)
        return head_dim * math.log(turn) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / yarn.factor * ramp, _attention_factor(yarn)


def _attention_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    grown = lambda weight: 0.1 * weight * math.log(yarn.factor) + 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return grown(yarn.mscale) / grown(yarn.mscale_all_dim)
    return grown(1.0)


def ntk_alpha(lengths: jax.Array, seq_length: int) -> jax.Array:
    """Returns max(2^ceil(log2(n / seq_length) + 1) - 1, 1) of integer lengths n, as int32.

    In integers: a logarithm in float32 may miss the powers of two, where it jumps.
    """
    times = (lengths + seq_length - 1) // seq_length
    doublings = jnp.where(times > 1, 32 - jax.lax.clz(jnp.maximum(times - 1, 1)), 0)
    return (2 << doublings) - 1


def ntk_frequencies(frequencies: np.ndarray, alpha_BT: jax.Array) -> jax.Array:
    """Returns [B, T, H/2] float32: the frequencies of the base theta * alpha^(H / (H - 2))."""
    pairs = frequencies.size
    exponents = jnp.arange(pairs, dtype=jnp.float32) / max(pairs - 1, 1)
    shrink = jnp.exp(-jnp.log(alpha_BT.astype(jnp.float32))[..., None] * exponents[None, None])
    return shrink * jnp.asarray(frequencies, jnp.float32)[None, None]


def logn(positions: jax.Array, seq_length: int) -> jax.Array:
    """Returns what queries are multiplied by, float32: max(1, log(position + 1) to the base seq_length)."""
    return jnp.maximum(jnp.log(positions.astype(jnp.float32) + 1) / math.log(seq_length), 1.0)


def temperature(lengths: jax.Array, original_length: int) -> jax.Array:
    """Returns max(1, 0.1 ln(n / original_length) + 1), float32: queries and keys are each multiplied by it."""
    return jnp.maximum(0.1 * jnp.log(lengths.astype(jnp.float32) / original_length) + 1.0, 1.0)
