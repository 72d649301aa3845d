"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Divides by the root mean square over the last axis, then multiplies by `scale`.

    Statistics are float32; the result is cast back BEFORE the multiplication, as in the published models.

    Args:
      x: [..., D], any float type.
      scale: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in the type of x.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
