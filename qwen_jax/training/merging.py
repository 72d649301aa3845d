"""The Online Merging Optimizer (arXiv:2405.17931): each step merged with what fine-tuning had added to a model.

Preference optimisation costs some of what a model could do before: the alignment tax. With tau = SFT - pretrained, and
d the step that Adam takes, the parameters move by

    OnDARE    (1 - alpha) B(d) + alpha B(tau)       B keeps each entry with probability `reserve`
    OnTIES    (1 - alpha) d' + alpha tau'           the `reserve` largest entries of each tensor, then of each entry
                                                    only what has the sign of their sum

tau is made sparse once, before training, and clamped to [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwen_jax.errors import InputError

Kind = Literal["none", "dare", "ties"]


@dataclass(frozen=True)
class MergingConfig:
    """How much is merged; the defaults are those of the authors' script."""

    kind: Kind = "none"
    alpha: float = 1e-7
    reserve: float = 0.01
    rescale: bool = False  # of OnDARE: divide what is kept by `reserve`, so that its mean is as it was
    pretrained: str = ""  # Hugging Face folder or workdir of the model before fine-tuning

    def __post_init__(self):
        for name, low, high in (("alpha", 0.0, 1.0), ("reserve", math.nextafter(0, 1), 1.0)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"merging.{name} is {getattr(self, name)}; expected {'above ' * bool(low)}0 to 1")
        if self.kind != "none" and not self.pretrained:
            raise InputError("merging.pretrained is missing; expected the model that the base was fine-tuned from")


class MergeState(NamedTuple):
    """How many steps were taken, and tau as it is merged (zeros until `begin`)."""

    count: jax.Array
    direction: Any


def online(config: MergingConfig, *, seed: int) -> optax.GradientTransformation:
    """Returns the transformation that comes last in a chain, behind the learning rate.

    Weight decay, where there is any, is a part of the step that is merged.

    Args:
      config: of a kind.
      seed: of what OnDARE keeps.
    """

    def init(params):
        return MergeState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        key = jax.random.fold_in(jax.random.key(seed), state.count + 1)
        kept = sparse(config, updates, key)
        merged = jax.tree.map(lambda step, tau: _merged(config, step, tau), kept, state.direction)
        return merged, MergeState(state.count + 1, state.direction)

    return optax.GradientTransformation(init, update)


def begin(config: MergingConfig, opt_state, tuned, pretrained, *, seed: int):
    """Returns the state of step 0, with tau = tuned - pretrained in it, made sparse and clamped.

    Args:
      config: of a kind.
      opt_state: of a chain with `online` in it.
      tuned, pretrained: parameters after and before fine-tuning.
      seed: as of `online`.
    """
    tau = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), tuned, pretrained)
    kept = sparse(config, tau, jax.random.fold_in(jax.random.key(seed), 0))
    direction = jax.tree.map(lambda x, like: jnp.clip(x, -1, 1).astype(like.dtype), kept, tuned)
    return optax.tree.set(opt_state, direction=direction)


def sparse(config: MergingConfig, tree, key: jax.Array):
    """Returns the tree with all but `reserve` of each tensor's entries 0: at random (dare), or the smallest (ties)."""
    leaves, structure = jax.tree.flatten(tree)
    if config.kind == "ties":
        return jax.tree.map(lambda x: _largest(x, config.reserve), tree)
    keys = jax.random.split(key, len(leaves))
    scale = 1 / config.reserve if config.rescale else 1.0
    keep = lambda x, key: jnp.where(jax.random.bernoulli(key, config.reserve, x.shape), x * scale, 0).astype(x.dtype)
    return structure.unflatten([keep(x, key) for x, key in zip(leaves, keys, strict=True)])


def _largest(x: jax.Array, share: float) -> jax.Array:
    count = max(1, math.ceil(share * x.size))
    least = jax.lax.top_k(jnp.abs(x).reshape(-1), count)[0][-1]
    return jnp.where(jnp.abs(x) >= least, x, 0)


def _merged(config: MergingConfig, step: jax.Array, tau: jax.Array) -> jax.Array:
    if config.kind == "ties":
        sign = jnp.sign(step + tau)
        step, tau = (jnp.where(jnp.sign(x) == sign, x, 0) for x in (step, tau))
    return (1 - config.alpha) * step + config.alpha * tau
