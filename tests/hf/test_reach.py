"""How a model reads further than it was trained to: read in all spellings, written, and read again the same."""

import json

import pytest

from qwen_jax import hf
from qwen_jax.config import DualChunk, QwenConfig, V1Lengths, Yarn
from qwen_jax.hf import convert, settings
from tests.conftest import FAMILIES, tiny
from tests.hf import made_up
from tests.hf.test_loading import v1

QWEN2 = FAMILIES["qwen2-untied"]
PUBLISHED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}


def read(folder, config: QwenConfig = QWEN2, **changes) -> QwenConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made_up.fields(config, **changes)))
    return hf.read_config(folder)


@pytest.mark.parametrize("changes", [
    dict(rope_scaling=PUBLISHED),
    dict(rope_scaling={**PUBLISHED, "rope_type": "yarn", "attention_factor": None, "beta_fast": 32}),
    dict(rope_theta=None, rope_parameters={**PUBLISHED, "rope_theta": 1e6}),
    dict(rope_scaling=PUBLISHED, rope_parameters={**PUBLISHED, "rope_theta": 1e6}),
], ids=lambda changes: ",".join(changes))  # fmt: skip
def test_yarn_is_read_with_the_factor_it_states(changes, tmp_path):
    found = read(tmp_path, **changes)
    assert found.yarn == Yarn(4.0, 48)
    assert found.max_position_embeddings == 192  # which is 4 * 48; the file says 128, as published files do


def test_yarn_without_a_length_starts_from_the_files_and_every_field_counts(tmp_path):
    fields = dict(beta_fast=16, beta_slow=2, attention_factor=1.25, mscale=0.5, mscale_all_dim=0.75)
    found = read(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 2, **fields})
    assert found.yarn == Yarn(2.0, 128, 16.0, 2.0, 1.25, 0.5, 0.75) and found.max_position_embeddings == 256


def test_chunks_are_read_with_the_defaults_of_the_inference_code(tmp_path):
    published = {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 64}
    found = read(tmp_path, dual_chunk_attention_config=published | {"sparse_attention_enabled": True})
    assert found.dual_chunk == DualChunk(64, 16, 64) and found.max_position_embeddings == 128
    assert read(tmp_path, dual_chunk_attention_config={}).dual_chunk == DualChunk(8192, 1024, 0)


def test_qwen_v1_says_what_it_does_beyond_its_training(tmp_path):
    fields, tensors = v1(tiny(tie_word_embeddings=False, num_key_value_heads=4))
    found, _ = hf.load(made_up.write(tmp_path / "v1", fields, tensors))
    assert found.v1_lengths == V1Lengths(48, True, True) and found.max_position_embeddings == 128
    convert.convert(tmp_path / "v1", tmp_path / "qwen2")
    assert hf.read_config(tmp_path / "qwen2").v1_lengths == found.v1_lengths
    off = fields | {"use_dynamic_ntk": False, "use_logn_attn": False}
    assert not hf.load(made_up.write(tmp_path / "off", off, tensors))[0].v1_lengths.on


@pytest.mark.parametrize("part", [
    dict(yarn=Yarn(2.0, 64, attention_factor=1.1)), dict(yarn=Yarn(4.0, 32, mscale=0.5, mscale_all_dim=1.0)),
    dict(dual_chunk=DualChunk(64, 16, 64)), dict(dual_chunk=DualChunk(64, 16, clamp="paper")),
    dict(v1_lengths=V1Lengths(64, use_logn_attn=True)), dict(),
], ids=str)  # fmt: skip
def test_what_is_written_is_read_again(part, tmp_path):
    config = QWEN2.replace(**part)
    (tmp_path / "config.json").write_text(json.dumps(settings.write(config, "float32")))
    found = hf.read_config(tmp_path)
    assert found.replace(dtype=config.dtype, param_dtype=config.param_dtype) == config
