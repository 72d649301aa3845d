"""Checkpoint folders made up from a config by hand-written names and shapes, not by the tables under test."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from qwen_jax.config import QwenConfig


def tensors(config: QwenConfig, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    """Random tensors under the names of qwen2 or qwen3."""
    draw = np.random.default_rng(seed).normal
    D, F, V, H = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_attention_heads * H, config.num_key_value_heads * H
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (q, D),
            layer + "self_attn.k_proj.weight": (kv, D),
            layer + "self_attn.v_proj.weight": (kv, D),
            layer + "self_attn.o_proj.weight": (D, q),
        }
        if config.is_sparse(i):
            shapes |= experts(config, layer + "mlp.")
        else:
            shapes |= mlp(layer + "mlp.", D, F)
        if config.qkv_bias:
            shapes |= {layer + f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if config.qk_norm:
            shapes |= {layer + f"self_attn.{x}_norm.weight": (H,) for x in "qk"}
    return {name: draw(0.02, 0.15, shape).astype(dtype) for name, shape in shapes.items()}


def mlp(name: str, D: int, F: int) -> dict[str, tuple[int, ...]]:
    return {name + "gate_proj.weight": (F, D), name + "up_proj.weight": (F, D), name + "down_proj.weight": (D, F)}


def experts(config: QwenConfig, name: str) -> dict[str, tuple[int, ...]]:
    D = config.hidden_size
    shapes = {name + "gate.weight": (config.num_experts, D)}
    for e in range(config.num_experts):
        shapes |= mlp(f"{name}experts.{e}.", D, config.moe_intermediate_size)
    if config.shared_expert_intermediate_size:
        shapes |= mlp(name + "shared_expert.", D, config.shared_expert_intermediate_size)
        shapes[name + "shared_expert_gate.weight"] = (1, D)
    return shapes


def fields(config: QwenConfig, **changes) -> dict:
    """The config.json of a model, as published ones are spelled; None takes a field out."""
    kind, moe = "qwen3" if config.qk_norm else "qwen2", config.num_experts > 0
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
            "tie_word_embeddings")  # fmt: skip
    values = {name: getattr(config, name) for name in same} | {
        "architectures": [f"{kind.capitalize()}{'Moe' if moe else ''}ForCausalLM"],
        "model_type": f"{kind}_moe" if moe else kind,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 64,
        "max_window_layers": 1,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if config.qk_norm:
        values |= {"head_dim": config.head_dim, "attention_bias": False, "rope_scaling": None}
    if moe:
        same = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
        values |= {name: getattr(config, name) for name in same}
        values["mlp_only_layers"] = list(config.mlp_only_layers)
        if kind == "qwen2":
            values["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    if not config.qk_norm and config.head_dim * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def write(folder: pathlib.Path, fields: dict, tensors: dict[str, np.ndarray], parts: int = 1) -> pathlib.Path:
    """Writes the folder; in `parts` files with an index if more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if parts == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        held = dict(list(tensors.items())[part::parts])
        save_file(held, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoint(folder: pathlib.Path, config: QwenConfig, *, dtype=ml_dtypes.bfloat16, parts=1, seed=0, **changes):
    """Writes a random checkpoint of this config; `changes` are of its config.json."""
    return write(folder, fields(config, **changes), tensors(config, dtype, seed), parts)


def held(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, by the library's own reader."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
