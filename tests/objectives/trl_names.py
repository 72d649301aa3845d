"""Our side of what tests/parity/trl_losses.py computes, by the same names."""

import jax.numpy as jnp

from qwen_jax.objectives import dpo, reward

TRL_VARIANTS = {
    "sigmoid": dict(),
    "hinge": dict(variant="hinge"),
    "ipo": dict(variant="ipo", per_token=True),
    "robust": dict(variant="robust", label_smoothing=0.2),
    "sigmoid_norm": dict(per_token=True),
}


def losses(x, *, beta: float = 0.1, kl: float = 0.7, kto_weights=(1.5, 0.5)) -> dict[str, float]:
    """Our mean loss for each of trl's, from the arrays of `trl_losses.arrays`."""
    x = {name: jnp.asarray(value) for name, value in x.items() if not name.startswith("loss/")}
    policy, reference = ((x[f"{who}_chosen"], x[f"{who}_rejected"]) for who in ("policy", "ref"))
    lengths, scores = (x["chosen_length"], x["rejected_length"]), (x["score_chosen"], x["score_rejected"])
    nothing = (jnp.zeros_like(policy[0]),) * 2
    found = {}
    for name, how in TRL_VARIANTS.items():
        how = {"lengths": lengths if how.get("per_token") else None} | {
            k: v for k, v in how.items() if k != "per_token"
        }
        found[f"dpo/{name}"] = dpo.loss(*policy, *reference, beta=beta, **how)[0]
    found["cpo/smoothed"] = dpo.loss(*policy, *nothing, beta=beta, label_smoothing=0.2)[0]
    found["cpo"] = dpo.cpo(*policy, lengths=lengths, beta=beta, nll_weight=0.0)[0]
    found["simpo"] = dpo.simpo(*policy, lengths=lengths, beta=2.0, gamma=0.5)[0]
    found["orpo"] = dpo.orpo(*policy, lengths=lengths, beta=beta)[0]
    both = [jnp.concatenate(side) for side in (policy, reference)]
    desirable = jnp.arange(len(both[0])) < len(policy[0])
    found["kto"] = dpo.kto(
        *both, desirable, jnp.float32(kl), beta=beta, desirable_weight=kto_weights[0], undesirable_weight=kto_weights[1]
    )[0]
    found["reward"] = reward.loss(*scores)[0]
    found["reward/margin"] = reward.loss(*scores, margin=x["margin"])[0]
    found["reward/centring"] = reward.loss(*scores, centring=0.01)[0]
    return {name: float(value) for name, value in found.items()}
