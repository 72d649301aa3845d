"""LoRA adapters of a model: their shapes, logical axes and first values, and how they join its parameters.

Adapters are a tree of their own (`ops.lora` says which): what a LoRA run trains, checkpoints and shards, while the
parameters stay a plain argument. `join` them and every function of `models` computes the adapted model.

Shapes: L layers, R rank, n rows of the vocabulary, D model width.
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp

from qwen_jax.config import LINEARS, LoraConfig, QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.models.functional import abstract as abstract_params
from qwen_jax.models.functional import axes as params_axes
from qwen_jax.models.functional import init as init_params
from qwen_jax.ops import lora as arithmetic
from qwen_jax.ops import quantisation
from qwen_jax.sharding import Layout


def init(config: QwenConfig, lora: LoraConfig, key: jax.Array, params: dict) -> dict:
    """Returns the adapters of step 0, float32, with which the model computes what it did without them.

    A is uniform within 1 / sqrt(inputs), as in peft; B is 0. DoRA's magnitudes are the kernels' lengths; rows of the
    vocabulary and the head of a reward model, which is trained whole, are the model's own. Routed experts have none: in
    a layer with experts gate, up and down are those of the shared one.

    Args:
      config: the model.
      lora: with a rank.
      key: of A.
      params: of the model; read only for DoRA, for rows and for a score head.

    Raises:
      InputError: where a target is nowhere in the model.
    """
    adapters = _of_targets(params, lora, lambda path, kernel: _first(path, kernel, lora, key))
    if lora.row_ids:
        ids = jnp.array(lora.row_ids)
        adapters["rows"] = {name: params[name][ids].astype(jnp.float32) for name in _tables(config)}
    if config.head == "score":
        adapters["score"] = params["score"].astype(jnp.float32)
    return adapters


def abstract(config: QwenConfig, lora: LoraConfig) -> dict:
    """Returns the adapters' shapes and dtypes, computing nothing."""
    return jax.eval_shape(lambda params: init(config, lora, jax.random.key(0), params), abstract_params(config))


def trained(config: QwenConfig, lora: LoraConfig, layout: Layout) -> dict:
    """Returns what a run trains, as keywords of `training.program.build`: the model itself, or adapters beside it.

    Raises:
      InputError: as `base`, and where a target is nowhere in the model.
    """
    if not lora.rank:
        return dict(init_params=functools.partial(init_params, config), param_axes=params_axes(config))
    make = functools.partial(init, config, lora)
    return dict(init_params=make, param_axes=axes(config, lora), frozen=[base(config, lora, layout)])


def base(config: QwenConfig, lora: LoraConfig, layout: Layout) -> tuple[dict, dict]:
    """Returns the shapes and the logical axes of the frozen parameters, quantised if `lora` says so.

    Codes and scales are split as their kernel is, but for axes that the mesh does not divide: of several values one.

    Raises:
      InputError: where routed experts would have to be quantised.
    """
    shapes, names = abstract_params(config), params_axes(config)
    if not lora.quantised:
        return shapes, names
    if config.num_experts:
        raise InputError(f"lora.quantised is {lora.quantised!r}, but routed experts are not quantised; expected ''")
    quantised = jax.eval_shape(functools.partial(quantise, lora=lora), shapes)

    def of_part(struct: dict, names: dict) -> dict:
        found = {name: of_part(struct[name], part) for name, part in names.items() if isinstance(part, dict)}
        found |= {name: part for name, part in names.items() if not isinstance(part, dict) and name in struct}
        if "codes" in struct:
            for part in ("codes", "scales"):
                sizes = zip(names["kernel"], struct[part].shape, strict=True)
                found[part] = tuple(None if size % layout.size(name) else name for name, size in sizes)
        return found

    return quantised, of_part(quantised, names)


def quantise(params: dict, lora: LoraConfig) -> dict:
    """Returns the parameters of a model as the frozen ones beside `lora` are kept."""
    return quantisation.quantise_tree(params, lora.quantised, LINEARS) if lora.quantised else params


def axes(config: QwenConfig, lora: LoraConfig) -> dict:
    """Returns the adapters' logical axes: those of the kernels, the rank whole."""

    def of_kernel(path, names):
        (stack, *kernel), inner = names, LINEARS[path[-1]]
        adapter = {"a": (stack, *kernel[:inner], None), "b": (stack, None, *kernel[inner:])}
        return adapter | ({"magnitude": (stack, *kernel[inner:])} if lora.dora else {})

    found = _of_targets(params_axes(config), lora, of_kernel)
    if lora.row_ids:
        found["rows"] = dict.fromkeys(_tables(config), (None, "embed"))
    if config.head == "score":
        found["score"] = (None, "embed")
    return found


def _of_targets(params: dict, lora: LoraConfig, make) -> dict:
    """Returns a tree of make(path, kernel) for each kernel that lora.targets names."""
    found: set[str] = set()

    def walk(tree: dict, path: tuple[str, ...]) -> dict:
        if path and path[-1] in lora.targets and {"kernel", "codes"} & tree.keys():
            found.add(path[-1])
            return make(path, tree["kernel"] if "kernel" in tree else _kernel(tree))
        below = {name: walk(part, (*path, name)) for name, part in tree.items() if isinstance(part, dict)}
        return {name: part for name, part in below.items() if part}

    adapters = walk(params, ())
    if missing := [name for name in lora.targets if name not in found]:
        raise InputError(
            f"lora.targets names {', '.join(missing)}, which this model has not (routed experts have no adapters); "
            f"expected some of {', '.join(name for name in lora.targets if name in found) or 'q, k, v, o'}"
        )
    return adapters


def _kernel(quantised: dict) -> jax.Array:
    """Of a quantised one; where only its shape is asked for, the compiler leaves the values out."""
    return quantisation.dequantise(quantised["codes"], quantised["scales"], jnp.float32)


def _first(path: tuple[str, ...], kernel: jax.Array, lora: LoraConfig, key: jax.Array) -> dict:
    inner = LINEARS[path[-1]]
    stack, inputs, outputs = kernel.shape[:1], kernel.shape[1 : 1 + inner], kernel.shape[1 + inner :]
    bound, key = 1.0 / math.sqrt(math.prod(inputs)), jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    adapter = {
        "a": jax.random.uniform(key, (*stack, *inputs, lora.rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((*stack, lora.rank, *outputs), jnp.float32),
    }
    return adapter | ({"magnitude": arithmetic.lengths(kernel, 1, inner)} if lora.dora else {})


def join(params: dict, adapters: dict, lora: LoraConfig) -> dict:
    """Returns one tree that every function of `models` takes as params; nothing of params is copied."""
    scale = arithmetic.scale(lora.rank, lora.alpha, rslora=lora.rslora)
    return arithmetic.join(params, adapters, scale=scale, row_ids=lora.row_ids)


def merge(params: dict, adapters: dict, lora: LoraConfig) -> dict:
    """Returns plain parameters that compute what the joined ones compute, rounded to their dtype."""
    return arithmetic.merge(join(params, adapters, lora))


def _tables(config: QwenConfig) -> tuple[str, ...]:
    return ("embedding",) if config.tie_word_embeddings or config.head == "score" else ("embedding", "head")
