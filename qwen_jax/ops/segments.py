"""Documents that share a row: segment ids (0 is padding) and positions inside each document."""

import jax
import jax.numpy as jnp


def positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns [B, T] int32: each token's distance from the first token of its run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
