"""The convert command: same model in another dtype, other files, another layout; mistakes are one line and status 2."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import hf
from qwen_jax.hf import convert
from tests.conftest import FAMILIES, tiny
from tests.hf import made_up
from tests.hf.test_loading import v1


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_model_stays_what_it_is(family, tmp_path):
    src = made_up.checkpoint(tmp_path / "src", family, dtype=np.float32, torch_dtype="float32")
    for name in ("tokenizer.json", "generation_config.json", "run_me.py", "pytorch_model.bin"):
        (src / name).write_text("{}")
    assert convert.main([str(src), str(tmp_path / "dst"), "--dtype", "bfloat16", "--shard-bytes", "20000"]) == 0
    config, params = hf.load(tmp_path / "dst")
    expected, source = hf.load(src, dtype="bfloat16")
    assert config == expected
    same(params, source)
    names = {file.name for file in (tmp_path / "dst").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "model.safetensors.index.json"} < names
    assert not {"run_me.py", "pytorch_model.bin", "model.safetensors"} & names
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (src, tmp_path / "dst"))
    assert after == before | {"torch_dtype": "bfloat16"}


def test_fields_we_do_not_compute_with_are_kept(tmp_path):
    chunks = {"chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 96}
    fields = made_up.fields(tiny(), dual_chunk_attention_config=chunks, dtype="bfloat16", torch_dtype=None)
    src = made_up.write(tmp_path / "src", fields, made_up.tensors(tiny()))
    convert.convert(src, tmp_path / "dst", dtype="float32")
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == fields | {"dtype": "float32"}


def test_qwen_v1_becomes_qwen2(tmp_path):
    config = tiny(tie_word_embeddings=False, num_key_value_heads=4)
    made_up.write(tmp_path / "v1", *v1(config))
    convert.convert(tmp_path / "v1", tmp_path / "qwen2")
    same(hf.load(tmp_path / "v1")[1], hf.load(tmp_path / "qwen2")[1])
    assert made_up.held(tmp_path / "qwen2").keys() == made_up.tensors(config).keys()


def test_what_belongs_to_another_model_does_not_stay_beside_the_new_weights(tmp_path):
    src = made_up.checkpoint(tmp_path / "src", FAMILIES["qwen2-tied"])
    (src / "vocab.json").write_text("{}")
    dst = made_up.checkpoint(tmp_path / "dst", FAMILIES["qwen3"])
    for name in ("tokenizer.json", "generation_config.json", "pytorch_model.bin", "README.md"):
        (dst / name).write_text("old")
    convert.convert(src, dst)
    assert {file.name for file in dst.iterdir()} == {"config.json", "model.safetensors", "vocab.json", "README.md"}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    src = made_up.checkpoint(tmp_path / "src", FAMILIES["qwen3"])
    (tmp_path / "file").write_text("x")
    assert convert.main([str(src), str(tmp_path / "file" / "dst")]) == 2
    assert capsys.readouterr().err.endswith("file/dst: cannot be written (Not a directory)\n")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    src = made_up.checkpoint(tmp_path / "src", FAMILIES["qwen3"], attention_bias=True)
    command = [sys.executable, "-m", "qwen_jax.hf.convert", str(src), str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and not (tmp_path / "dst").exists()
    assert result.stderr.count("\n") == 1 and "attention_bias is True" in result.stderr


def test_a_folder_can_be_converted_in_place(tmp_path):
    src = made_up.checkpoint(tmp_path / "src", tiny())
    before = hf.load(src)[1]
    convert.convert(src, src, dtype="float32")
    config, params = hf.load(src)
    assert config.param_dtype == "float32"
    same(params, jax.tree.map(lambda x: x.astype(jnp.float32), before))
