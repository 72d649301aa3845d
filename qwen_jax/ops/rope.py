"""Rotary position embedding (Su et al., arXiv:2104.09864), half-rotation layout: pairs are (i, i + H/2).

Shapes: B batch, T length, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Returns the angle between neighbouring positions, [H/2] float32, greatest first.

    Rounded where the published code rounds, power and reciprocal each to float32: an angle is a frequency times a
    position, so at position 30,000 the last bit of a frequency is worth 1e-4 of a logit.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def tables(positions_BT: jax.Array, frequencies: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, each [B, T, H/2] float32.

    Float32 whatever the model computes in: bfloat16 angles are wrong beyond a few hundred positions.

    Args:
      positions_BT: integers, of any leading axes.
      frequencies: [H/2], or one set for each token, [B, T, H/2].
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    if frequencies.ndim == 1:
        frequencies = frequencies.reshape((1,) * positions_BT.ndim + (-1,))
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates every pair of every head by its angle; computed in float32, returned in the type of x."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
