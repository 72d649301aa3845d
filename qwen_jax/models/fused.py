"""Parameters laid out for decoding: one token at a time, reading weights is all the work there is.

q, k and v become one kernel, gate and up another, the head is stored the way its product reads it, and everything is
cast to the type it is used in, once instead of at every token.

Shapes: L layers, D model width, N query heads, K kv heads, G = N/K query heads per kv head, H head dim, F MLP width,
V vocabulary.
"""

import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig
from qwen_jax.models.decoder import head


def fuse(config: QwenConfig, params: dict) -> dict:
    """Returns the parameters of `Decoder(config, fused=True)`, and the head.

    Args:
      config: the model; config.scan_layers False gives one tree a layer.
      params: as `models.init` makes them.

    Returns:
      "decoder": the decoder's tree, in config.dtype. "head": [D, V] in config.dtype.
    """
    layers = params["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    fused = {
        "attention_norm": layers["attention_norm"],
        "attention": {
            "qkv": _qkv(config, attention),
            **{name: part for name, part in attention.items() if name not in ("q", "k", "v")},
        },
        "mlp_norm": layers["mlp_norm"],
        "mlp": {
            "gate_up": {"kernel": jnp.stack([mlp["gate"]["kernel"], mlp["up"]["kernel"]], axis=-2)},
            "down": mlp["down"],
        },
    }
    names = {"layers": fused}
    if not config.scan_layers:
        take = lambda i: jax.tree.map(lambda x: x[i], fused)
        names = {f"layer_{i}": take(i) for i in range(config.num_hidden_layers)}
    decoder = {"embedding": params["embedding"], **names, "final_norm": params["final_norm"]}
    cast = lambda x: x.astype(jnp.dtype(config.dtype))
    return jax.tree.map(cast, {"decoder": decoder, "head": head(config, params).T})


def fused_axes(config: QwenConfig, axes: dict) -> dict:
    """Returns the logical axes of what `fuse` returns.

    Args:
      config: the model.
      axes: of the ordinary parameters, from `models.axes`.
    """
    layers = axes["layers"]
    attention = {name: part for name, part in layers["attention"].items() if name not in ("q", "k", "v")}
    qkv = {"kernel": ("layers", "embed", "kv_heads", None, "head_dim")}
    if config.qkv_bias:
        qkv["bias"] = ("layers", "kv_heads", None, "head_dim")
    fused = {
        "attention_norm": layers["attention_norm"],
        "attention": {"qkv": qkv, **attention},
        "mlp_norm": layers["mlp_norm"],
        "mlp": {"gate_up": {"kernel": ("layers", "embed", None, "mlp")}, "down": layers["mlp"]["down"]},
    }
    names = {"layers": fused}
    if not config.scan_layers:
        one = jax.tree.map(lambda names: names[1:], fused, is_leaf=lambda leaf: isinstance(leaf, tuple))
        names = {f"layer_{i}": one for i in range(config.num_hidden_layers)}
    decoder = {"embedding": axes["embedding"], **names, "final_norm": axes["final_norm"]}
    return {"decoder": decoder, "head": ("embed", "vocab")}


def _qkv(config: QwenConfig, attention: dict) -> dict:
    """Each kv head behind the G query heads it serves: [..., K, G + 2, H]."""
    K = config.num_key_value_heads

    def together(name):
        q, k, v = (attention[part][name] for part in ("q", "k", "v"))
        q = q.reshape(*q.shape[:-2], K, -1, q.shape[-1])
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    return {name: together(name) for name in attention["q"]}
