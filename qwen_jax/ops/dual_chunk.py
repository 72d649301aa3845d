"""Dual chunk attention (An et al., arXiv:2402.17463): distances never beyond those of training, keys rotated once.

A document is cut into chunks of `stride` positions. A key is rotated by its place in its chunk, whoever looks at it, so
a cache of keys stays valid as the text grows. A query is rotated thrice, and which of the three meets a key is told by
how many chunks lie between them:

  intra       same chunk            place in the chunk: true distances
  successive  the chunk before      the place + stride, at most the clamp: true distances up to the local window
  inter       all earlier chunks    2 * stride - 1, at most the clamp: as far as the model knows how to look

So what a query sees of each kind is one interval of key positions, and attention is one softmax over the three. With
chunk_size the length of training, stride = chunk_size - local_size. The paper calls the stride the chunk size.

Shapes: A the three kinds in this order, B batch, T length.
"""

import jax
import jax.numpy as jnp

from qwen_jax.long_context import DualChunk

INTRA, SUCCESSIVE, INTER = KINDS = range(3)


def key_positions(positions_BT: jax.Array, chunks: DualChunk) -> jax.Array:
    """Returns the int32 positions [B, T] that keys are rotated by."""
    return positions_BT % chunks.stride


def query_positions(positions_BT: jax.Array, chunks: DualChunk) -> jax.Array:
    """Returns the int32 positions [A, B, T] that queries are rotated by, one set for each kind of key."""
    place_BT = positions_BT % chunks.stride
    successive_BT = jnp.minimum(place_BT + chunks.stride, chunks.farthest)
    inter_BT = jnp.full_like(place_BT, min(2 * chunks.stride - 1, chunks.farthest))
    return jnp.stack([place_BT, successive_BT, inter_BT])


def windows(positions_BT: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest key position that each query sees of each kind: int32 [A, B, T] both.

    No position is in two of a query's windows, and together they hold all that are not later than itself.
    """
    start_BT = positions_BT // stride * stride
    least_BT = jnp.full_like(start_BT, jnp.iinfo(jnp.int32).min)
    since_ABT = jnp.stack([start_BT, start_BT - stride, least_BT])
    return since_ABT, jnp.stack([positions_BT, start_BT - 1, start_BT - stride - 1])
