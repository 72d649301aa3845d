"""Which experts a token goes to, and the statistics that the balancing losses need (Qwen3 report, arXiv:2505.09388).

Shapes: B rows, T length, E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """What a router did, as sums over the tokens of each row: sums add up over layers, microbatches and meshes.

    Attributes:
      counts: [B, E] float32 how many of the row's tokens chose each expert; no gradient.
      probs: [B, E] float32 sum of the router's probabilities, before the choice.
      z: [B] float32 sum of the squared logsumexp of the logits.
      tokens: [B] float32 how many tokens these are sums over.
    """

    counts: jax.Array
    probs: jax.Array
    z: jax.Array
    tokens: jax.Array


def route(
    logits_BTE: jax.Array, valid_BT: jax.Array, *, experts_per_token: int, normalize: bool
) -> tuple[jax.Array, jax.Array, Routing]:
    """Chooses the likeliest experts of each token; no noise, no capacity.

    p = softmax(logits) over all experts, in float32; the K largest are the gates, divided by their sum if `normalize`.

    Args:
      logits_BTE: float.
      valid_BT: bool; tokens that are not valid go to no expert and into no statistic.
      experts_per_token: K.
      normalize: whether the gates of a token sum to 1.

    Returns:
      gates_BTK float32, 0 for tokens that are not valid; experts_BTK int32, E for those; the sums of each row.
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    E = logits_BTE.shape[-1]
    logsumexp_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    probs_BTE = jnp.exp(logits_BTE - logsumexp_BT1)
    gates_BTK, experts_BTK = jax.lax.top_k(probs_BTE, experts_per_token)
    if normalize:
        gates_BTK = gates_BTK / jnp.sum(gates_BTK, axis=-1, keepdims=True)
    valid_BT1 = valid_BT[:, :, None]
    experts_BTK = jnp.where(valid_BT1, experts_BTK, E)
    statistics = Routing(
        counts=_counts(experts_BTK, E),
        probs=jnp.sum(jnp.where(valid_BT1, probs_BTE, 0.0), axis=1),
        z=jnp.sum(jnp.where(valid_BT, logsumexp_BT1[..., 0] ** 2, 0.0), axis=1),
        tokens=jnp.sum(valid_BT, axis=1, dtype=jnp.float32),
    )
    return jnp.where(valid_BT1, gates_BTK, 0.0), experts_BTK, statistics


def _counts(experts_BTK: jax.Array, E: int) -> jax.Array:
    # One choice of K after the other: [B, T, K, E] would be K times the logits.
    choices_KBT = jnp.moveaxis(experts_BTK, -1, 0)
    ids_11E = jnp.arange(E)[None, None, :]
    return sum(jnp.sum(chosen_BT[:, :, None] == ids_11E, axis=1, dtype=jnp.float32) for chosen_BT in choices_KBT)
