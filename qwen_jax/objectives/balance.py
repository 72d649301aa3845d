"""Losses that keep a router from sending everything to few experts, on the sums that `ops.routing.route` returns.

The first three are E * sum_e f_e * P_e, f_e the share of tokens that chose expert e (sum_e f_e = K) and P_e the mean of
its probability: K where the load is even, up to E where it is not. f is a constant, P has the gradient. They differ in
what f and P are taken over. The sums of a batch that is split over a mesh are sums over all of it.

Shapes: L layers with experts, B rows, E experts, G groups of rows.
"""

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError

KINDS = ("global-batch", "per-layer", "per-sequence", "pooled")


def loss(
    counts_LBE: jax.Array,
    probs_LBE: jax.Array,
    z_LB: jax.Array,
    tokens_LB: jax.Array,
    *,
    kind: str,
    weight: float,
    z_weight: float,
    before: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns what is added to the loss of a model with experts.

    Args:
      counts_LBE, probs_LBE, z_LB, tokens_LB: of `ops.routing.Routing`.
      kind: "global-batch", "per-layer" (of each microbatch), "per-sequence", or "pooled", the one of transformers.
      weight: of the balancing loss.
      z_weight: of `router_z`.
      before: as in `global_batch`; the other kinds do without.

    Returns:
      weight * balance + z_weight * z; {"balance", "router_z", "overload"} unweighted; own counts as of `global_batch`.

    Raises:
      InputError: on an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"the balancing loss {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    sums = counts_LBE, probs_LBE, tokens_LB
    mean, own = global_batch(*sums, before=before)
    if kind == "pooled":
        mean = pooled(*sums)
    elif kind != "global-batch":
        mean = per_layer(*sums, groups=counts_LBE.shape[1] if kind == "per-sequence" else 1)
    z = router_z(z_LB, tokens_LB)
    metrics = {"balance": mean, "router_z": z, "overload": overload(counts_LBE)}
    return weight * mean + z_weight * z, metrics, own


def pooled(counts_LBE: jax.Array, probs_LBE: jax.Array, tokens_LB: jax.Array) -> jax.Array:
    """Returns the auxiliary loss of transformers (qwen2_moe, qwen3_moe): f and P over the tokens of all layers at once.

    One layer's overload can hide behind another's: prefer `per_layer`.
    """
    E = counts_LBE.shape[-1]
    f_E, p_E = (jnp.sum(x, axis=(0, 1)) / _positive(jnp.sum(tokens_LB)) for x in (counts_LBE, probs_LBE))
    return E * jnp.sum(jax.lax.stop_gradient(f_E) * p_E)


def per_layer(counts_LBE: jax.Array, probs_LBE: jax.Array, tokens_LB: jax.Array, *, groups: int = 1) -> jax.Array:
    """Returns the mean over layers of each layer's loss (Fedus et al., arXiv:2101.03961, section 2.2).

    Args:
      counts_LBE, probs_LBE, tokens_LB: of `ops.routing.Routing`.
      groups: f and P are taken over each of so many equal groups of successive rows, and their losses averaged by
        tokens: B balances every sequence, the number of data shards is what frameworks do that do not exchange counts.
    """
    L, B, E = counts_LBE.shape
    grouped = lambda x: jnp.sum(x.reshape(L, groups, B // groups, *x.shape[2:]), axis=2)
    counts_LGE, probs_LGE, tokens_LG = grouped(counts_LBE), grouped(probs_LBE), grouped(tokens_LB)
    f_LGE = jax.lax.stop_gradient(counts_LGE) / _positive(tokens_LG)[:, :, None]
    return E * jnp.sum(f_LGE * probs_LGE) / _positive(jnp.sum(tokens_LG))


def global_batch(
    counts_LBE: jax.Array,
    probs_LBE: jax.Array,
    tokens_LB: jax.Array,
    *,
    before: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the loss with f over the whole batch (Qiu et al., arXiv:2501.11873; Qwen3 report, section 2).

    Balance is then asked of the corpus and not of each sequence, which leaves experts free to specialise. Over data
    shards f is whole by itself; over the microbatches of an accumulated step it is the running one of the paper: this
    microbatch and those before it.

    Args:
      counts_LBE, probs_LBE, tokens_LB: of this microbatch.
      before: (counts_LE, tokens_L) of the step's earlier microbatches.

    Returns:
      The mean over layers of E * sum_e f_e * P_e; (counts_LE, tokens_L) of this microbatch, to be added to `before`.
    """
    E = counts_LBE.shape[-1]
    own = jax.lax.stop_gradient((jnp.sum(counts_LBE, axis=1), jnp.sum(tokens_LB, axis=1)))
    counts_LE, tokens_L = own if before is None else jax.tree.map(jnp.add, own, jax.lax.stop_gradient(before))
    f_LE = counts_LE / _positive(tokens_L)[:, None]
    return E * jnp.sum(f_LE * jnp.sum(probs_LBE, axis=1)) / _positive(jnp.sum(tokens_LB)), own


def router_z(z_LB: jax.Array, tokens_LB: jax.Array) -> jax.Array:
    """Returns the mean of logsumexp(logits)^2 over tokens and layers (Zoph et al., arXiv:2202.08906, equation 5)."""
    return jnp.sum(z_LB) / _positive(jnp.sum(tokens_LB))


def overload(counts_LBE: jax.Array) -> jax.Array:
    """Returns the busiest expert's load over the mean load, averaged over layers: 1 is even, E / K the most."""
    counts_LE = jnp.sum(counts_LBE, axis=1)
    return jnp.mean(jnp.max(counts_LE, axis=-1) / _positive(jnp.mean(counts_LE, axis=-1)))


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)
