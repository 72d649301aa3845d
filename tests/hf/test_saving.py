"""What is saved is what was loaded, byte for byte; a checkpoint is there whole or not at all."""

import json
import os

import jax
import numpy as np
import pytest

from qwen_jax import hf, models, sharding
from qwen_jax.errors import InputError
from qwen_jax.hf import saving
from tests.conftest import FAMILIES, MESHES, MOE_FAMILIES, tiny
from tests.hf import made_up

QWEN2 = FAMILIES["qwen2-untied"]


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), (
            name
        )


def zeros(config):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract(config))


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("family, dtype", list(zip(FAMILIES, ["float32", "bfloat16", "float16"], strict=True)))
def test_a_round_trip_keeps_every_byte(family, dtype, tmp_path):
    family = FAMILIES[family]
    made_up.checkpoint(tmp_path / "in", family, dtype=jax.numpy.dtype(dtype), parts=2)
    config, params = hf.load(tmp_path / "in")
    hf.save(tmp_path / "out", config, params)
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]
    same_tensors(made_up.held(tmp_path / "in"), made_up.held(tmp_path / "out"))
    assert hf.load(tmp_path / "out")[0] == config


@pytest.mark.parametrize("family, cut", list(zip(FAMILIES, MESHES, strict=True)))
def test_what_a_mesh_holds_is_saved_as_from_one_device(family, cut, tmp_path):
    family, mesh = FAMILIES[family], sharding.make_mesh(MESHES[cut])
    folder = made_up.checkpoint(tmp_path / "in", family)
    config, params = hf.load(folder, mesh=mesh)
    hf.save(tmp_path / "out", config, params)
    same_tensors(made_up.held(folder), made_up.held(tmp_path / "out"))


@pytest.mark.parametrize("name", ["qwen2-moe-first-dense", "qwen3-moe-some-dense"])
def test_experts_of_a_mesh_are_saved_as_they_were_loaded(name, tmp_path):
    family, mesh = MOE_FAMILIES[name], sharding.make_mesh(sharding.MeshConfig(expert=4, fsdp=2))
    folder = made_up.checkpoint(tmp_path / "in", family, parts=2)
    config, params = hf.load(folder, mesh=mesh)
    assert config == family.replace(dtype="bfloat16", param_dtype="bfloat16")
    alone = hf.load(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    hf.save(tmp_path / "out", config, params)
    same_tensors(made_up.held(folder), made_up.held(tmp_path / "out"))
    assert hf.read_config(tmp_path / "out") == config.replace(param_dtype="float32")


def test_files_stay_below_the_limit_and_the_index_names_them(tmp_path):
    folder, limit = made_up.checkpoint(tmp_path / "in", QWEN2), 12_000
    hf.save(tmp_path / "out", *hf.load(folder), shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = made_up.held(tmp_path / "out")
    same_tensors(made_up.held(folder), tensors)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    sizes = {}
    for name, file in index["weight_map"].items():
        sizes.setdefault(file, []).append(tensors[name].nbytes)
    assert len(sizes) > 2 and all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    count = len(sizes)
    assert sorted(sizes) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def test_the_old_checkpoint_is_replaced_and_its_other_files_stay(tmp_path):
    folder = made_up.checkpoint(tmp_path / "model", QWEN2, parts=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"not ours")
    config, params = hf.load(folder)
    params = jax.tree.map(lambda x: x + 1, params)
    hf.save(folder, config, params)
    assert listing(folder) == ["adapter_model.safetensors", "config.json", "model.safetensors", "tokenizer.json"]
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], params)
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("failing", ["write", "config", "move"])
def test_a_failure_leaves_the_old_checkpoint_as_it_was(failing, tmp_path, monkeypatch):
    folder = made_up.checkpoint(tmp_path / "model", QWEN2)
    config, params = hf.load(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rename = os.rename

    def full(*_):
        raise OSError("no space left on device")

    def no_move(source, target):
        if str(source).endswith("partial"):
            full()
        rename(source, target)

    if failing == "write":
        monkeypatch.setattr(saving.boxes, "to_file", full)
    elif failing == "config":
        monkeypatch.setattr(saving, "_json", full)
    else:
        monkeypatch.setattr(os, "rename", no_move)
    with pytest.raises(OSError, match="no space"):
        hf.save(folder, config, jax.tree.map(lambda x: x + 1, params))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert listing(tmp_path) == ["model"]


def test_a_target_that_is_no_checkpoint_is_not_replaced(tmp_path):
    config, params = tiny(), zeros(tiny())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("")
    made_up.checkpoint(tmp_path / "run" / "checkpoint-5", QWEN2)
    (tmp_path / "run" / "config.json").write_text("{}")
    for target, pattern in (("notes", "no config.json"), ("file", "is a file"), ("run", "checkpoint-5")):
        with pytest.raises(InputError, match=pattern):
            hf.save(tmp_path / target, config, params)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", config, params)
    assert hf.load(tmp_path / "empty")[0].hidden_size == config.hidden_size


@pytest.mark.parametrize("change, pattern", [
    (lambda p: p.pop("final_norm"), "final_norm/scale"),
    (lambda p: p.update(extra=np.zeros(3)), "extra"),
    (lambda p: p.update(embedding=p["embedding"][:-1]), "embedding"),
    (lambda p: p.update(embedding=p["embedding"].astype(np.float16)), "float16, float32"),
], ids=["missing", "unexpected", "shape", "dtypes"])  # fmt: skip
def test_params_that_are_not_the_models_are_refused(change, pattern, tmp_path):
    params = zeros(tiny())
    change(params)
    with pytest.raises(InputError, match=pattern):
        hf.save(tmp_path / "out", tiny(), params)
    assert not listing(tmp_path)


def test_a_model_without_a_published_layout_is_refused(tmp_path):
    config = tiny(qk_norm=True)
    with pytest.raises(InputError, match="no published layout"):
        hf.save(tmp_path / "out", config, zeros(config))
    mixed = MOE_FAMILIES["qwen3-moe"].replace(shared_expert_intermediate_size=16)
    with pytest.raises(InputError, match="shared_expert_intermediate_size 16 with qk_norm True is no published layout"):
        hf.save(tmp_path / "out", mixed, zeros(mixed))
    with pytest.raises(InputError, match="shard_bytes"):
        hf.save(tmp_path / "out", tiny(), zeros(tiny()), shard_bytes=0)
