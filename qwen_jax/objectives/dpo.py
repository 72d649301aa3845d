"""Direct preference optimisation and its siblings, on log-probabilities of whole answers.

What is given are sums over the tokens of an answer, float or bfloat16; everything is computed in float32. With
lengths, they are divided by the number of tokens first. Shapes: B pairs (of `kto`: answers).
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.objectives import masked

Variant = Literal["sigmoid", "ipo", "hinge", "robust"]
Lengths = tuple[jax.Array, jax.Array]
Result = tuple[jax.Array, dict[str, jax.Array]]


def loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: Variant = "sigmoid",
    lengths: Lengths | None = None,
    weights: jax.Array | None = None,
) -> Result:
    """Returns the mean over pairs of the loss on h, the difference of the two answers' log-ratios policy / reference.

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)   (arXiv:2305.18290; with e > 0 conservative DPO)
    robust   the same with a minus before e, over (1 - 2 e): its mean under labels flipped with probability e is the
             loss of the true ones (arXiv:2403.00409)
    hinge    max(0, 1 - beta h)   (arXiv:2305.10425)
    ipo      (h - 1 / (2 beta))^2   (arXiv:2310.12036; its authors divide by lengths)

    Args:
      policy_chosen, policy_rejected: [B] log-probability of each answer under the policy.
      ref_chosen, ref_rejected: under the reference; no gradient flows there.
      beta: how much the policy is held to the reference.
      label_smoothing: e, 0 to below 0.5; of sigmoid and robust alone.
      variant: as above.
      lengths: ([B], [B]) tokens of the chosen and of the rejected answers, to divide by; None divides nothing.
      weights: [B] of each pair in all means; all 1 if None.

    Returns:
      The mean, scalar float32. Metrics, means of the same kind: "accuracy" (share with h > 0), "reward_chosen" and
      "reward_rejected" (beta times the log-ratio: the implicit reward) and "reward_margin", their difference.

    Raises:
      InputError: on an unknown variant, or a label_smoothing that it cannot have.
    """
    if variant not in get_args(Variant):
        raise InputError(f"the DPO variant {variant!r} is unknown; expected one of {', '.join(get_args(Variant))}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and variant not in ("sigmoid", "robust")):
        raise InputError(
            f"label_smoothing is {label_smoothing} for variant {variant!r}; "
            "expected 0 to below 0.5, and 0 for hinge and ipo"
        )
    policy, reference = (policy_chosen, policy_rejected), (ref_chosen, ref_rejected)
    reference = jax.lax.stop_gradient(_per_token(reference, lengths))
    ratios = [ours - theirs for ours, theirs in zip(_per_token(policy, lengths), reference, strict=True)]
    h_B = ratios[0] - ratios[1]
    if variant == "ipo":
        loss_B = jnp.square(h_B - 1 / (2 * beta))
    elif variant == "hinge":
        loss_B = jax.nn.relu(1 - beta * h_B)
    else:
        loss_B = _smoothed(beta * h_B, label_smoothing, robust=variant == "robust")
    return _summed_up(loss_B, h_B, beta * ratios[0], beta * ratios[1], weights)


def simpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    lengths: Lengths,
    beta: float = 2.0,
    gamma: float = 0.5,
    weights: jax.Array | None = None,
) -> Result:
    """Returns the mean of -log sigmoid(beta (chosen - rejected) - gamma) on log-probabilities per token.

    SimPO (arXiv:2405.14734, equation 6) needs no reference. Arguments as in `loss`.
    """
    chosen_B, rejected_B = _per_token((policy_chosen, policy_rejected), lengths)
    h_B = chosen_B - rejected_B
    return _summed_up(-jax.nn.log_sigmoid(beta * h_B - gamma), h_B, beta * chosen_B, beta * rejected_B, weights)


def cpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    lengths: Lengths,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    weights: jax.Array | None = None,
) -> Result:
    """Returns the mean of -log sigmoid(beta (chosen - rejected)) + nll_weight * nll of the chosen answer.

    CPO (arXiv:2401.08417, equation 5) takes a uniform reference. The nll is per token of its answer. Arguments as in
    `loss`.
    """
    chosen_B, rejected_B = (x.astype(jnp.float32) for x in (policy_chosen, policy_rejected))
    h_B, nll_B = chosen_B - rejected_B, -_per_token((chosen_B,), lengths[:1])[0]
    loss_B = -jax.nn.log_sigmoid(beta * h_B) + nll_weight * nll_B
    mean, metrics = _summed_up(loss_B, h_B, beta * chosen_B, beta * rejected_B, weights)
    return mean, metrics | {"nll": masked.mean(nll_B, weights)}


def orpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    lengths: Lengths,
    beta: float = 0.1,
    weights: jax.Array | None = None,
) -> Result:
    """Returns the mean of the chosen answer's nll - beta log sigmoid(log odds(chosen) - log odds(rejected)).

    odds(y) = p / (1 - p) with p the geometric mean of the tokens' probabilities (ORPO, arXiv:2403.07691, equations 6
    and 7). Arguments as in `loss`.
    """
    chosen_B, rejected_B = _per_token((policy_chosen, policy_rejected), lengths)
    odds_B = _log_odds(chosen_B) - _log_odds(rejected_B)
    loss_B = -chosen_B - beta * jax.nn.log_sigmoid(odds_B)
    mean, metrics = _summed_up(loss_B, odds_B, beta * chosen_B, beta * rejected_B, weights)
    return mean, metrics | {"nll": -masked.mean(chosen_B, weights)}


def kto(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Returns the mean over answers of w (1 - sigmoid(beta (log-ratio - kl))), turned round for undesirable ones.

    KTO (arXiv:2402.01306, equation 8) learns from answers that are good or bad each by itself.

    Args:
      policy, reference: [B] log-probability of each answer.
      desirable: [B] bool.
      kl: scalar, the policy's distance from the reference, estimated on answers to other prompts; below 0 it counts as
        0, and no gradient flows there.
      beta, desirable_weight, undesirable_weight: as above.
    """
    ratio_B = policy.astype(jnp.float32) - jax.lax.stop_gradient(reference.astype(jnp.float32))
    lead_B = ratio_B - jnp.maximum(jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32)), 0.0)
    sign_B = jnp.where(desirable, 1.0, -1.0)
    weight_B = jnp.where(desirable, desirable_weight, undesirable_weight)
    accuracy = jnp.mean((sign_B * lead_B > 0).astype(jnp.float32))
    return jnp.mean(weight_B * jax.nn.sigmoid(-sign_B * beta * lead_B)), {"accuracy": accuracy}


def _smoothed(logit_B: jax.Array, e: float, *, robust: bool) -> jax.Array:
    right_B = -jax.nn.log_sigmoid(logit_B)
    if not e:
        return right_B
    wrong_B = -jax.nn.log_sigmoid(-logit_B)
    return ((1 - e) * right_B - e * wrong_B) / (1 - 2 * e) if robust else (1 - e) * right_B + e * wrong_B


def _per_token(sums, lengths) -> list[jax.Array]:
    sums = [x.astype(jnp.float32) for x in sums]
    if lengths is None:
        return sums
    return [x / jnp.maximum(n, 1).astype(jnp.float32) for x, n in zip(sums, lengths, strict=True)]


def _log_odds(log_p_B: jax.Array) -> jax.Array:
    """log(p / (1 - p)); a probability of 1 counts as the largest float below it."""
    log_p_B = jnp.minimum(log_p_B, -jnp.finfo(jnp.float32).epsneg)
    return log_p_B - jnp.log(-jnp.expm1(log_p_B))


def _summed_up(loss_B, lead_B, chosen_B, rejected_B, weights) -> Result:
    mean = functools.partial(masked.mean, weights=weights)
    metrics = {
        "accuracy": mean(lead_B > 0),
        "reward_chosen": mean(chosen_B),
        "reward_rejected": mean(rejected_B),
        "reward_margin": mean(chosen_B - rejected_B),
    }
    return mean(loss_B), metrics
