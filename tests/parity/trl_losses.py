"""trl's own loss code on given log-probabilities and scores: its trainers' methods, with a model that returns them.

trl computes its losses inside the trainers, so each method is called on a stand-in for the trainer that has what the
method reads. Sums over an answer are put on its first token.
"""

import types
from unittest import mock

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, KL, KTO_WEIGHTS = 7, 0.7, (1.5, 0.5)
DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": dict(label_smoothing=0.2),
    "sigmoid_norm": {},
}  # trl's names: the two that divide by lengths are ipo and sigmoid_norm


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up log-probabilities of answers of 3 to 40 tokens, lengths, scores and margins, float32."""
    draw = np.random.default_rng(seed)
    lengths = {f"{side}_length": draw.integers(3, 40, PAIRS) for side in ("chosen", "rejected")}
    found = {name: n.astype(np.int32) for name, n in lengths.items()}
    for side in ("chosen", "rejected"):
        found[f"policy_{side}"] = np.minimum(-2.0 * lengths[f"{side}_length"] + draw.normal(0, 8, PAIRS), -0.5)
        found[f"ref_{side}"] = found[f"policy_{side}"] + draw.normal(0, 6, PAIRS)
        found[f"score_{side}"] = draw.normal(0, 3, PAIRS)
    found["margin"] = draw.uniform(0, 3, PAIRS)
    return {name: x if x.dtype == np.int32 else x.astype(np.float32) for name, x in found.items()}


def losses(x: dict[str, np.ndarray], beta: float = 0.1) -> dict[str, float]:
    """trl's mean loss by name."""
    t = {name: torch.from_numpy(np.array(value)) for name, value in x.items()}
    found = {f"dpo/{name}": _dpo(t, name, beta, **more) for name, more in DPO.items()}
    found["reward"] = _reward(t, {}, None)
    found["reward/margin"] = _reward(t, {"margin": t["margin"]}, None)
    found["reward/centring"] = _reward(t, {}, 0.01)
    found["kto"] = _kto(t, beta)
    means = [t[f"policy_{side}"] / t[f"{side}_length"] for side in ("chosen", "rejected")]
    cpo = types.SimpleNamespace(
        alpha=0.0, beta=beta, label_smoothing=0.0, loss_type="sigmoid", accelerator=_accelerator()
    )
    found["cpo"] = float(CPOTrainer.cpo_loss(cpo, t["policy_chosen"], t["policy_rejected"])[0].mean())
    cpo.label_smoothing = 0.2  # of DPO's sigmoid, too, where the reference is 0 everywhere
    found["cpo/smoothed"] = float(CPOTrainer.cpo_loss(cpo, t["policy_chosen"], t["policy_rejected"])[0].mean())
    cpo.label_smoothing, cpo.loss_type, cpo.simpo_gamma, cpo.beta = 0.0, "simpo", 0.5, 2.0
    found["simpo"] = float(CPOTrainer.cpo_loss(cpo, *means)[0].mean())
    orpo = types.SimpleNamespace(beta=beta, accelerator=_accelerator())
    found["orpo"] = float((-means[0] - ORPOTrainer.odds_ratio_loss(orpo, *means)[0]).mean())
    return found


def _accelerator():
    same = lambda x: x
    return types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same, gather=same)


def _trainer(**fields):
    metrics = mock.MagicMock()  # takes in whatever is logged
    model = types.SimpleNamespace(training=False)
    return types.SimpleNamespace(
        model=model,
        accelerator=_accelerator(),
        _metrics=metrics,
        _total_train_tokens=0,
        aux_loss_enabled=False,
        **fields,
    )


def _model(sums: torch.Tensor, length: int):
    """A model whose answers have these log-probabilities."""
    log_probs = torch.zeros(len(sums), length - 1)
    log_probs[:, 0] = sums
    zeros = torch.zeros_like(log_probs)
    outputs = types.SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **inputs: outputs


def _masked(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs whose completions have these lengths, behind a prompt of one token."""
    size = int(lengths.max()) + 1
    place = torch.arange(size)[None]
    mask = ((place >= 1) & (place <= lengths[:, None])).long()
    return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def _dpo(t, name: str, beta: float, label_smoothing: float = 0.0) -> float:
    trainer = _trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0],
        beta=beta, label_smoothing=label_smoothing, use_weighting=False,
    )  # fmt: skip
    inputs = _masked(torch.cat([t["chosen_length"], t["rejected_length"]]))
    model = _model(torch.cat([t["policy_chosen"], t["policy_rejected"]]), inputs["input_ids"].shape[1])
    inputs |= {f"ref_{side}_logps": t[f"ref_{side}"] for side in ("chosen", "rejected")}
    return float(DPOTrainer._compute_loss(trainer, model, inputs, False))


def _reward(t, inputs: dict, centring: float | None) -> float:
    trainer = _trainer(args=types.SimpleNamespace(center_rewards_coefficient=centring))
    scores = torch.cat([t["score_chosen"], t["score_rejected"]])[:, None]
    return float(RewardTrainer.compute_loss(trainer, lambda **_: types.SimpleNamespace(logits=scores), dict(inputs)))


def _kto(t, beta: float) -> float:
    trainer = _trainer(
        beta=beta,
        loss_type="kto",
        desirable_weight=KTO_WEIGHTS[0],
        undesirable_weight=KTO_WEIGHTS[1],
        precompute_ref_logps=True,
        calculate_KL=True,
    )
    inputs = _masked(torch.cat([t["chosen_length"], t["rejected_length"]]))
    policy, ref = (torch.cat([t[f"{who}_chosen"], t[f"{who}_rejected"]]) for who in ("policy", "ref"))
    kl = torch.full((2 * PAIRS,), KL)
    trainer._compute_kl_logps = lambda model, batch: kl
    inputs |= {"label": torch.arange(2 * PAIRS) < PAIRS, "ref_logps": ref, "ref_KL_logps": torch.zeros_like(kl)}
    model = _model(policy, inputs["input_ids"].shape[1])
    return float(KTOTrainer._compute_loss(trainer, model, inputs, False))
