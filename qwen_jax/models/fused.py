"""Parameters laid out for decoding: one token at a time, reading weights is all the work there is.

q, k and v become one kernel, gate and up another, the head is stored the way its product reads it, and everything is
cast to the type it is used in, once instead of at every token.

Shapes: L layers, D model width, N query heads, K kv heads, G = N/K query heads per kv head, H head dim, F MLP width,
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig
from qwen_jax.models.decoder import head
from qwen_jax.models.stacks import stacks
from qwen_jax.ops import lora, quantisation


def fuse(config: QwenConfig, params: dict) -> dict:
    """Returns the parameters of `Decoder(config, fused=True)`, and the head.

    Args:
      config: the model; config.scan_layers False gives one tree a layer.
      params: as `models.init` makes them; adapters joined with them are merged and quantised kernels made whole, since
        a step reads each weight anyway.

    Returns:
      "decoder": the decoder's tree, in config.dtype. "head": [D, V] in config.dtype.
    """
    params = quantisation.dequantise_tree(params)
    if lora.is_joined(params):
        params = lora.merge(params)
    layers = _by_layer(config, params, functools.partial(_fused_layer, config), take=lambda x, i: x[i])
    decoder = {"embedding": params["embedding"], **layers, "final_norm": params["final_norm"]}
    cast = lambda x: x.astype(jnp.dtype(config.dtype))
    return jax.tree.map(cast, {"decoder": decoder, "head": head(config, params).T})


def fused_axes(config: QwenConfig, axes: dict) -> dict:
    """Returns the logical axes of what `fuse` returns.

    Args:
      config: the model.
      axes: of the ordinary parameters, from `models.axes`.
    """
    layers = _by_layer(config, axes, functools.partial(_fused_layer_axes, config), take=lambda names, _: names[1:])
    return {
        "decoder": {"embedding": axes["embedding"], **layers, "final_norm": axes["final_norm"]},
        "head": ("embed", "vocab"),
    }


def _by_layer(config: QwenConfig, tree: dict, fuse_layer, take) -> dict:
    """Applies `fuse_layer` to the layers of each stack; with config.scan_layers False takes them apart."""
    apart, together = {}, {}
    for stack in stacks(config):
        for place, path in enumerate(stack.blocks()):
            fused = fuse_layer(functools.reduce(dict.__getitem__, path, tree))
            functools.reduce(lambda node, name: node.setdefault(name, {}), path, together).update(fused)
            for i, layer in enumerate(stack.layers(place)):
                cut = lambda leaf, i=i: take(leaf, i)
                apart[f"layer_{layer}"] = jax.tree.map(cut, fused, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return together if config.scan_layers else apart


def _fused_layer(config: QwenConfig, layer: dict) -> dict:
    attention = {name: part for name, part in layer["attention"].items() if name not in ("q", "k", "v")}
    fused = dict(layer, attention={"qkv": _qkv(config, layer["attention"]), **attention})
    together = lambda mlp: {
        "gate_up": {"kernel": jnp.stack([mlp["gate"]["kernel"], mlp["up"]["kernel"]], axis=-2)},
        "down": mlp["down"],
    }
    return _each_mlp(fused, together)


def _fused_layer_axes(config: QwenConfig, layer: dict) -> dict:
    attention = {name: part for name, part in layer["attention"].items() if name not in ("q", "k", "v")}
    qkv = {"kernel": ("layers", "embed", "kv_heads", None, "head_dim")}
    if config.qkv_bias:
        qkv["bias"] = ("layers", "kv_heads", None, "head_dim")
    fused = dict(layer, attention={"qkv": qkv, **attention})
    return _each_mlp(fused, lambda mlp: {"gate_up": {"kernel": ("layers", "embed", None, "mlp")}, "down": mlp["down"]})


def _each_mlp(layer: dict, change) -> dict:
    """Changes the layer's MLP, or the shared expert; routed experts stay as they are, sorted rows read them in turn."""
    if "mlp" in layer:
        return dict(layer, mlp=change(layer["mlp"]))
    if "shared" in layer["moe"]:
        return dict(layer, moe=dict(layer["moe"], shared=change(layer["moe"]["shared"])))
    return layer


def _qkv(config: QwenConfig, attention: dict) -> dict:
    """Each kv head behind the G query heads it serves: [..., K, G + 2, H]."""
    K = config.num_key_value_heads

    def together(name):
        q, k, v = (attention[part][name] for part in ("q", "k", "v"))
        q = q.reshape(*q.shape[:-2], K, -1, q.shape[-1])
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    return {name: together(name) for name in attention["q"]}
