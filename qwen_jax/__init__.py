"""Qwen in JAX: tokenizer, models, alignment objectives and training, from a laptop's CPU to a TPU pod.

Importing the package costs what importing jax and flax costs, and touches no device: each part is loaded when it is
first named.
"""

import importlib

_PARTS = (
    "batches",
    "config",
    "data",
    "hf",
    "models",
    "objectives",
    "ops",
    "rewards",
    "rollout",
    "sharding",
    "tokenizer",
    "training",
)


def __getattr__(name):
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its parts are {', '.join(_PARTS)}")


def __dir__():
    return sorted([*globals(), *_PARTS])
