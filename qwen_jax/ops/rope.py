"""Rotary position embedding (Su et al., arXiv:2104.09864), half-rotation layout: pairs are (i, i + H/2).

Shapes: B batch, T length, N heads, H head dim.
"""

import jax
import jax.numpy as jnp


def tables(positions_BT: jax.Array, *, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, each [B, T, H/2] float32, for integer positions.

    Float32 whatever the model computes in: bfloat16 angles are wrong beyond a few hundred positions.
    """
    inverse_frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse_frequency[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates every pair of every head by its angle; computed in float32, returned in the type of x."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
