"""AdamW with the schedules that the Qwen reports use."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import optax

from qwen_jax.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) and its learning rate.

    schedule: "constant" stays at the peak after warm-up; "cosine" falls from the end of warm-up on; "wsd" (warm-up,
    stable, decay) stays at the peak and falls linearly over the last decay_steps. Both reach the floor, final_ratio *
    peak, exactly at the last step, as warm-up reaches the peak at its last (a floor of 0 makes that step move nothing).
    """

    peak_lr: float = 3e-4
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0  # linear, from peak / warmup_steps on the first step to peak on the last of them
    decay_steps: int = 0  # of "wsd"
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; biases and norm scales are left alone
    clip_norm: float = 1.0  # global norm of the gradient; 0 for no clipping

    def __post_init__(self):
        for name in (
            "peak_lr",
            "warmup_steps",
            "decay_steps",
            "final_ratio",
            "b1",
            "b2",
            "eps",
            "weight_decay",
            "clip_norm",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"optimizer.{name} is {value}; expected a finite number of at least 0")
        for name in ("b1", "b2"):
            if getattr(self, name) >= 1:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; expected less than 1")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns step -> learning rate for a run of this many steps, the first being step 0.

    Raises:
      InputError: where warm-up and decay do not fit into the run.
    """
    warmup, decay, peak = config.warmup_steps, config.decay_steps, config.peak_lr
    if warmup > steps:
        raise InputError(f"optimizer.warmup_steps is {warmup}, more than the {steps} steps of the run")
    rest, top = steps - warmup, max(warmup - 1, 0)  # top: the first step at the peak
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - 1 - top, 1), alpha=config.final_ratio)
    elif config.schedule == "wsd":
        if not 0 < decay <= rest:
            raise InputError(
                f"optimizer.decay_steps is {decay}; expected 1 to {rest}, what warm-up leaves of {steps} steps"
            )
        # Counted from the last step before the fall, which may be the one before the run.
        fall = optax.linear_schedule(peak, config.final_ratio * peak, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [steps - 1 - decay - top])
    else:
        raise InputError(f"optimizer.schedule is {config.schedule!r}; expected constant, cosine or wsd")
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [top])


def make(config: OptimizerConfig, steps: int, *, rates: dict[str, float] | None = None) -> optax.GradientTransformation:
    """Returns clip -> Adam -> decoupled weight decay -> learning rate; `learning_rate` reads the last.

    Args:
      config: AdamW and its schedule.
      steps: of the run.
      rates: name of a parameter -> factor of its learning rate: {"b": 16} is LoRA+ (arXiv:2402.12354).
    """
    by_name = [optax.stateless(functools.partial(_by_name, rates))] if rates else []
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        *by_name,
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=make_schedule(config, steps)),
    )


def learning_rate(opt_state) -> jax.Array:
    """Returns the rate of the last update that was made."""
    return optax.tree.get(opt_state, "hyperparams")["learning_rate"]


def decayed(params):
    """Returns the tree of whether weight decay applies: to matrices and embeddings, told by their name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale", "magnitude"), params)


def _by_name(rates: dict[str, float], updates, params):
    """Multiplies the update of each parameter by the rate of its name, if it has one."""
    del params
    return jax.tree_util.tree_map_with_path(lambda path, update: update * rates.get(path[-1].key, 1.0), updates)
