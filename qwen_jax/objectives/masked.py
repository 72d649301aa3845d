"""Statistics over the tokens that a mask leaves, in float32; what is masked may be anything, nan included."""

import jax
import jax.numpy as jnp


def total(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns the sum of x over unmasked places, of all axes or of one."""
    kept = mask != 0
    return jnp.sum(jnp.where(kept, x.astype(jnp.float32), 0.0), axis=axis)


def mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns the mean of x over unmasked places; 0 where there are none."""
    count = jnp.sum(mask != 0, axis=axis, dtype=jnp.float32)
    return total(x, mask, axis) / jnp.maximum(count, 1.0)


def whiten(x: jax.Array, mask: jax.Array, *, shift: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """Returns x with mean 0 and variance 1 over unmasked places, 0 at the others.

    Args:
      x: any shape.
      mask: of its shape, 0 where x does not count.
      shift: False keeps the mean and scales alone.
      epsilon: added to the variance (population variance, divided by the number of places).
    """
    x, middle = x.astype(jnp.float32), mean(x, mask)
    scaled = (x - middle) * jax.lax.rsqrt(mean(jnp.square(x - middle), mask) + epsilon)
    return jnp.where(mask != 0, scaled if shift else scaled + middle, 0.0)
