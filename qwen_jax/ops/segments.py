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


def lengths(positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns [B, T] int32: the length of each token's document, one more than the last position of its run."""
    ends = jnp.concatenate(
        [segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], jnp.ones_like(segment_ids_BT[:, :1], bool)], axis=1
    )
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    last_BT = jax.lax.cummin(jnp.where(ends, index, index.shape[1] - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, last_BT, axis=1) + 1
