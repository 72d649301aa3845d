"""Statistics under a mask or weights, in float32; what weighs 0 is left out before it is multiplied: it may be nan."""

import jax
import jax.numpy as jnp


def total(x: jax.Array, weights: jax.Array, axis: int | None = None) -> jax.Array:
    """Returns the sum of weights * x, over all axes or one."""
    weights = weights.astype(jnp.float32)
    return jnp.sum(jnp.where(weights != 0, x.astype(jnp.float32), 0.0) * weights, axis=axis)


def mean(x: jax.Array, weights: jax.Array | None, axis: int | None = None) -> jax.Array:
    """Returns the mean of x under weights, all 1 if None; 0 where nothing weighs anything."""
    if weights is None:
        return jnp.mean(x.astype(jnp.float32), axis=axis)
    weight = jnp.sum(weights.astype(jnp.float32), axis=axis)
    return total(x, weights, axis) / jnp.where(weight > 0, weight, 1.0)


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
