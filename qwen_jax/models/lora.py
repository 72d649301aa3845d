"""LoRA adapters of a model: their shapes, logical axes and first values, and how they join its parameters.

Adapters are a tree of their own (`ops.lora` says which): what a LoRA run trains, checkpoints and shards, while the
parameters stay a plain argument. `join` them and every function of `models` computes the adapted model.

Shapes: L layers, R rank, n rows of the vocabulary, D model width.
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.models.functional import abstract as abstract_params
from qwen_jax.models.functional import axes as params_axes
from qwen_jax.ops import lora as arithmetic

# Where a target is, and how many axes of its kernel are inputs, behind the layers'.
PLACES = {
    "q": ("attention", 1), "k": ("attention", 1), "v": ("attention", 1), "o": ("attention", 2),
    "gate": ("mlp", 1), "up": ("mlp", 1), "down": ("mlp", 1),
}  # fmt: skip


def init(config: QwenConfig, lora: LoraConfig, key: jax.Array, params: dict) -> dict:
    """Returns the adapters of step 0, float32, with which the model computes what it did without them.

    A is uniform within 1 / sqrt(inputs), as in peft; B is 0. DoRA's magnitudes are the kernels' lengths; rows of the
    vocabulary are the model's own.

    Args:
      config: the model.
      lora: with a rank.
      key: of A.
      params: of the model; read only for DoRA and for rows.
    """
    adapters: dict = {}
    for number, name in enumerate(lora.targets):
        part, inner = PLACES[name]
        kernel = params["layers"][part][name]["kernel"]
        stack, inputs, outputs = kernel.shape[:1], kernel.shape[1 : 1 + inner], kernel.shape[1 + inner :]
        bound = 1.0 / math.sqrt(math.prod(inputs))
        adapter = {
            "a": jax.random.uniform(
                jax.random.fold_in(key, number), (*stack, *inputs, lora.rank), jnp.float32, -bound, bound
            ),
            "b": jnp.zeros((*stack, lora.rank, *outputs), jnp.float32),
        }
        if lora.dora:
            adapter["magnitude"] = arithmetic.lengths(kernel, 1, inner)
        adapters.setdefault("layers", {}).setdefault(part, {})[name] = adapter
    if lora.row_ids:
        ids = jnp.array(lora.row_ids)
        adapters["rows"] = {name: params[name][ids].astype(jnp.float32) for name in _tables(config)}
    return adapters


def abstract(config: QwenConfig, lora: LoraConfig) -> dict:
    """Returns the adapters' shapes and dtypes, computing nothing."""
    return jax.eval_shape(lambda params: init(config, lora, jax.random.key(0), params), abstract_params(config))


def axes(config: QwenConfig, lora: LoraConfig) -> dict:
    """Returns the adapters' logical axes: those of the kernels, the rank whole."""
    of_params, found = params_axes(config)["layers"], {}
    for name in lora.targets:
        part, inner = PLACES[name]
        stack, *kernel = of_params[part][name]["kernel"]
        adapter = {"a": (stack, *kernel[:inner], None), "b": (stack, None, *kernel[inner:])}
        if lora.dora:
            adapter["magnitude"] = (stack, *kernel[inner:])
        found.setdefault("layers", {}).setdefault(part, {})[name] = adapter
    if lora.row_ids:
        found["rows"] = dict.fromkeys(_tables(config), (None, "embed"))
    return found


def join(params: dict, adapters: dict, lora: LoraConfig) -> dict:
    """Returns one tree that every function of `models` takes as params; nothing of params is copied."""
    scale = arithmetic.scale(lora.rank, lora.alpha, rslora=lora.rslora)
    return arithmetic.join(params, adapters, scale=scale, row_ids=lora.row_ids)


def merge(params: dict, adapters: dict, lora: LoraConfig) -> dict:
    """Returns plain parameters that compute what the joined ones compute, rounded to their dtype."""
    return arithmetic.merge(join(params, adapters, lora))


def _tables(config: QwenConfig) -> tuple[str, ...]:
    return ("embedding",) if config.tie_word_embeddings else ("embedding", "head")
