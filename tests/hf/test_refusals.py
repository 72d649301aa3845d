"""What cannot be loaded is refused in one line that names it."""

import json
import pickle
import re

import numpy as np
import pytest

from qwen_jax import hf
from qwen_jax.errors import InputError
from tests.conftest import FAMILIES, MOE_FAMILIES, tiny
from tests.hf import made_up
from tests.hf.test_loading import v1

QWEN2, QWEN3 = FAMILIES["qwen2-untied"], FAMILIES["qwen3"]


def refused(folder, *patterns, **arguments):
    with pytest.raises(InputError) as error:
        hf.load(folder, **arguments)
    text = str(error.value)
    assert "\n" not in text
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


@pytest.mark.parametrize("changes", [
    dict(rope_scaling={"rope_type": "default"}),
    dict(rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    dict(torch_dtype=None, dtype="bfloat16", layer_types=["full_attention"] * 2),
    dict(sliding_window=None, max_window_layers=99),
], ids=lambda c: ",".join(c))  # fmt: skip
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_both_spellings_are_read(config, changes, tmp_path):
    found, _ = hf.load(made_up.checkpoint(tmp_path, config, **changes))
    assert found == config.replace(dtype="bfloat16", param_dtype="bfloat16")


@pytest.mark.parametrize("changes", [
    dict(rms_norm_eps=1e-5), dict(rope_theta=5e6), dict(head_dim=16, hidden_size=80), dict(max_position_embeddings=99),
], ids=lambda c: ",".join(c))  # fmt: skip
def test_fields_are_read_not_assumed(changes, tmp_path):
    config = QWEN2.replace(**changes)
    found, _ = hf.load(made_up.checkpoint(tmp_path, config))
    assert found == config.replace(dtype="bfloat16", param_dtype="bfloat16")


@pytest.mark.parametrize("config, changes, pattern", [
    (QWEN2, dict(use_sliding_window=True), "use_sliding_window is True"),
    (QWEN2, dict(layer_types=["full_attention", "sliding_attention"]), "layer_types is .*sliding_attention"),
    (QWEN2, dict(layer_types=3), "layer_types is 3; only a list"),
    (QWEN2, dict(rope_theta=None, rope_parameters={"rope_theta": "abc"}), "rope_theta is 'abc'; expected a number"),
    (QWEN2, dict(rope_theta=None, rope_parameters={"rope_theta": True}), "rope_theta is True; expected a number"),
    (QWEN2, dict(initializer_range="x"), "initializer_range is 'x'"),
    (QWEN2, dict(rms_norm_eps=10**400), "rms_norm_eps is 1000.*; expected a finite number"),
    (QWEN2, dict(num_attention_heads=0), "num_attention_heads is 0; expected 1 to"),
    (QWEN2, dict(vocab_size=10**30), "vocab_size is 10+; expected 1 to"),
    (QWEN2, dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, and the files hold 27 tensors"),
    (QWEN2, dict(rope_scaling={"type": "yarn"}), "rope_scaling has no factor"),
    (QWEN2, dict(rope_scaling={"type": "yarn", "factor": 0.5}), "yarn.factor is 0.5; expected at least 1"),
    (QWEN2, dict(rope_scaling={"type": "yarn", "factor": "4"}), "rope_scaling.factor is '4'; expected int or float"),
    (QWEN2, dict(rope_scaling={"type": "yarn", "factor": 4.0, "truncate": False}), "truncate is False"),
    (QWEN2, dict(rope_scaling={"type": "yarn", "factor": 4.0}, rope_parameters={"type": "yarn", "factor": 2.0}),
     "rope_parameters.yarn .*factor=2.0.* and rope_scaling.yarn .*factor=4.0.* differ"),
    (QWEN2, dict(dual_chunk_attention_config={"chunk_size": 64, "local_size": 40}), "local_size is 40; expected 1"),
    (QWEN2, dict(dual_chunk_attention_config={"chunk_size": 64.0}), "config.chunk_size is 64.0; expected int"),
    (QWEN2, dict(dual_chunk_attention_config=True), "dual_chunk_attention_config is True; expected an object"),
    (QWEN2, dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_parameters is of type 'linear'"),
    (QWEN2, dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "rope_theta 10000.0 .*1000000.0 differ"),
    (QWEN2, dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (QWEN2, dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (QWEN2, dict(model_type="llama"), "model_type is 'llama'.*qwen2, qwen3"),
    (QWEN2, dict(num_key_value_heads=3), "num_key_value_heads"),
    (QWEN2, dict(hidden_size="32"), "hidden_size is '32'; expected int"),
    (QWEN2, dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    (QWEN3, dict(attention_bias=True), "attention_bias is True"),
    (QWEN3, dict(head_dim=None), "has no head_dim"),
    *[(QWEN2, {name: None}, f"has no {name}") for name in (
        "model_type", "vocab_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads")],
], ids=str)  # fmt: skip
def test_a_config_we_do_not_compute_is_refused_by_field(config, changes, pattern, tmp_path):
    refused(made_up.checkpoint(tmp_path, config, **changes), re.escape(str(tmp_path / "config.json")), pattern)


@pytest.mark.parametrize("changes, pattern", [
    (dict(no_bias=False), "no_bias"), (dict(intermediate_size=97), "intermediate_size 97"),
    (dict(seq_length=None), "has no seq_length"), (dict(rotary_pct=0.25), "rotary_pct"),
], ids=str)  # fmt: skip
def test_a_v1_config_we_do_not_compute_is_refused_by_field(changes, pattern, tmp_path):
    fields, tensors = v1(tiny(tie_word_embeddings=False, num_key_value_heads=4))
    refused(made_up.write(tmp_path, fields | changes, tensors), pattern)


def test_all_that_is_wrong_with_the_tensors_is_told_at_once(tmp_path):
    tensors = made_up.tensors(QWEN2)
    for i in range(2):
        del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.1.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(33, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.int8)
    refused(
        made_up.write(tmp_path, made_up.fields(QWEN2), tensors),
        r"missing: lm_head.weight, model.layers.\{0-1\}.mlp.up_proj.weight",
        r"unexpected: model.layers.1.self_attn.o_proj.bias",
        r"model.norm.weight is \[33\], config.json says \[32\]",
        r"dtype other than F32, BF16, F16: model.layers.0.input_layernorm.weight \(I8\)",
    )


def test_values_that_a_smaller_dtype_does_not_hold_are_refused(tmp_path):
    tensors = made_up.tensors(QWEN2)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 1e6)
    made_up.write(tmp_path, made_up.fields(QWEN2), tensors)
    refused(tmp_path, "model.norm.weight has values over 65504", dtype="float16")
    hf.load(tmp_path, dtype="bfloat16")


def test_several_dtypes_need_a_decision(tmp_path):
    tensors = made_up.tensors(QWEN2)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    folder = made_up.write(tmp_path, made_up.fields(QWEN2), tensors)
    refused(folder, "float16: model.norm.weight", "dtype=")
    assert hf.load(folder, dtype="float32")[0].param_dtype == "float32"


def test_a_head_that_is_not_its_embedding_is_no_tied_head(tmp_path):
    tensors = made_up.tensors(tiny())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    refused(made_up.write(tmp_path, made_up.fields(tiny()), tensors), "tie_word_embeddings", "lm_head.weight")


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: data[:-1], lambda data: data[:100], lambda data: b"",
    lambda data: b"\xff" * 8 + data[8:], lambda data: data[:8] + b"?" + data[9:], lambda data: data + b"more",
], ids=["half", "one byte short", "header cut", "empty", "length", "no JSON", "longer"])  # fmt: skip
def test_a_damaged_file_is_named(damage, tmp_path):
    file = made_up.checkpoint(tmp_path, QWEN2) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path, re.escape(str(file)), "is no whole safetensors file")


def test_a_missing_part_is_named(tmp_path):
    (made_up.checkpoint(tmp_path, QWEN2, parts=3) / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "1 of 3 files of the index are missing: model-00002-of-00003.safetensors")


def test_a_part_without_the_tensors_of_the_index_is_noticed(tmp_path):
    made_up.checkpoint(tmp_path, QWEN2, parts=3)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00003.safetensors").read_bytes()
    )
    refused(tmp_path, "missing: ")


def test_an_index_cannot_reach_out_of_the_folder(tmp_path):
    folder = made_up.checkpoint(tmp_path / "in", QWEN2, parts=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model-00001-of-00002.safetensors").rename(tmp_path / "out.safetensors")
    text = json.dumps(index).replace("model-00001-of-00002", "../out")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "outside the folder: ../out.safetensors")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(made_up.fields(QWEN2)))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "pytorch_model.bin", "run code", "save_pretrained")


def test_other_folders_are_told_what_they_lack(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: is no folder")
    refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: is not JSON")
    (tmp_path / "config.json").write_text(json.dumps(made_up.fields(QWEN2)))
    refused(tmp_path, "holds no model.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refused(tmp_path, "the download is not whole")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "has no weight_map")


def test_an_unknown_dtype_is_refused(tmp_path):
    refused(made_up.checkpoint(tmp_path, QWEN2), "dtype is 'int8'", dtype="int8")


@pytest.mark.parametrize("name", ["qwen2-moe-first-dense", "qwen3-moe-some-dense"])
def test_one_missing_expert_is_named(name, tmp_path):
    config = MOE_FAMILIES[name]
    tensors = made_up.tensors(config)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    folder = made_up.write(tmp_path, made_up.fields(config), tensors)
    refused(folder, "missing: model.layers.1.mlp.experts.5.up_proj.weight")


@pytest.mark.parametrize("changes, pattern", [
    (dict(num_experts=None), "has no num_experts"), (dict(num_experts_per_tok=9), "num_experts_per_tok is 9, more"),
    (dict(norm_topk_prob=None), "has no norm_topk_prob"), (dict(attention_bias=True), "attention_bias is True"),
], ids=str)  # fmt: skip
def test_a_config_of_experts_we_do_not_compute_is_refused_by_field(changes, pattern, tmp_path):
    refused(made_up.checkpoint(tmp_path, MOE_FAMILIES["qwen3-moe"], **changes), pattern)
