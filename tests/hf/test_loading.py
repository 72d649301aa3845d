"""A published folder becomes the parameter tree it stands for, on any mesh; a device reads its own part only."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax import hf, models, sharding
from qwen_jax.hf import files, layouts
from qwen_jax.long_context import V1Lengths
from tests.conftest import FAMILIES, MESHES, tiny
from tests.hf import made_up

# Each family on one mesh, each mesh under one family.
PAIRS = pytest.mark.parametrize("family, cut", list(zip(FAMILIES, MESHES, strict=True)))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_parameter_is_its_tensor(family, tmp_path):
    config, params = hf.load(made_up.checkpoint(tmp_path, family, dtype=np.float32))
    params = jax.tree.map(np.asarray, params)
    assert config == family.replace(dtype="bfloat16", param_dtype="float32")
    tensors, c = made_up.tensors(family), family
    equal(params["embedding"], tensors["model.embed_tokens.weight"])
    equal(params["final_norm"]["scale"], tensors["model.norm.weight"])
    if not c.tie_word_embeddings:
        equal(params["head"], tensors["lm_head.weight"])
    for i in range(c.num_hidden_layers):
        mine, theirs = (
            jax.tree.map(lambda x, i=i: x[i], params["layers"]),
            lambda name, i=i: tensors[f"model.layers.{i}.{name}"],
        )
        attention, mlp = mine["attention"], mine["mlp"]
        equal(mine["attention_norm"]["scale"], theirs("input_layernorm.weight"))
        equal(mine["mlp_norm"]["scale"], theirs("post_attention_layernorm.weight"))
        for x, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
            kernel = theirs(f"self_attn.{x}_proj.weight").T.reshape(c.hidden_size, heads, c.head_dim)
            equal(attention[x]["kernel"], kernel)
            if c.qkv_bias:
                equal(attention[x]["bias"], theirs(f"self_attn.{x}_proj.bias").reshape(heads, c.head_dim))
            if c.qk_norm and x != "v":
                equal(attention[f"{x}_norm"]["scale"], theirs(f"self_attn.{x}_norm.weight"))
        out = theirs("self_attn.o_proj.weight").T.reshape(c.num_attention_heads, c.head_dim, c.hidden_size)
        equal(attention["o"]["kernel"], out)
        for x in ("gate", "up", "down"):
            equal(mlp[x]["kernel"], theirs(f"mlp.{x}_proj.weight").T)
    assert jax.tree.structure(params) == jax.tree.structure(models.abstract(config))


def test_several_files_are_one_model(family, tmp_path):
    one = hf.load(made_up.checkpoint(tmp_path / "one", family))
    several = hf.load(made_up.checkpoint(tmp_path / "several", family, parts=3))
    assert one[0] == several[0]
    equal(one[1], several[1])


@PAIRS
def test_on_a_mesh_each_tensor_is_split_as_init_splits_it_and_read_once(family, cut, tmp_path, monkeypatch):
    family, mesh = FAMILIES[family], sharding.make_mesh(MESHES[cut])
    folder = made_up.checkpoint(tmp_path, family)
    alone, read = hf.load(folder)[1], []
    original = files.Tensor.read

    def counted(tensor, slices):
        part = original(tensor, slices)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(files.Tensor, "read", counted)
    config, split = hf.load(folder, mesh=mesh)
    equal(alone, split)
    expected = sharding.tree_shardings(models.axes(config), models.abstract(config), sharding.Layout(mesh))
    jax.tree.map(lambda x, place: x.sharding == place or pytest.fail(f"{x.sharding}"), split, expected)
    once = {(str(path), str(shard.index)): shard.data.nbytes
            for path, x in jax.tree.leaves_with_path(split) for shard in x.addressable_shards}  # fmt: skip
    assert sum(read) == sum(once.values())  # replicas are not read again, and nothing is read that is not held


def test_a_device_reads_its_part_only(tmp_path, monkeypatch):
    config = tiny(num_attention_heads=8, num_key_value_heads=8)
    folder, read = made_up.checkpoint(tmp_path, config), {}
    original = files.Tensor.read
    monkeypatch.setattr(
        files.Tensor, "read", lambda t, slices: read.setdefault(t.name, []).append(slices) or original(t, slices)
    )
    hf.load(folder, mesh=sharding.make_mesh(sharding.MeshConfig(tensor=4), devices=jax.devices()[:4]))
    assert read["model.layers.1.self_attn.q_proj.weight"] == [
        (slice(i, i + 32), slice(0, 32)) for i in range(0, 128, 32)
    ]
    assert read["model.layers.0.mlp.down_proj.weight"] == [(slice(0, 32), slice(i, i + 12)) for i in range(0, 48, 12)]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_dtype_is_that_of_the_parameters(stored, wanted, tmp_path):
    folder = made_up.checkpoint(tmp_path, tiny(), dtype=jnp.dtype(stored))
    config, params = hf.load(folder, dtype=wanted)
    assert config.param_dtype == (wanted or stored)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {wanted or stored}
    expected = made_up.tensors(tiny(), jnp.dtype(stored))["model.embed_tokens.weight"].astype(wanted or stored)
    equal(params["embedding"], expected)


def test_replicas_do_not_share_what_a_donation_overwrites(tmp_path):
    folder = made_up.checkpoint(tmp_path, tiny(hidden_size=64), dtype=np.float32)
    mesh = sharding.make_mesh(MESHES["data2-fsdp2-tensor2"])
    params = hf.load(folder, mesh=mesh)[1]
    before = jax.tree.map(np.array, params)
    after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    equal(after, jax.tree.map(lambda x: x + 1, before))


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    config, tensors = tiny(), made_up.tensors(tiny())
    plain = hf.load(made_up.write(tmp_path / "plain", made_up.fields(config), tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    twice = hf.load(made_up.write(tmp_path / "twice", made_up.fields(config), tensors))
    assert plain[0] == twice[0] and "head" not in twice[1]
    equal(plain[1], twice[1])


def test_buffers_of_old_files_are_passed_over(tmp_path):
    tensors = made_up.tensors(tiny())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    hf.load(made_up.write(tmp_path, made_up.fields(tiny()), tensors))


def v1(config, seed=0):
    """The same model in the layout of Qwen v1: config.json fields and tensors."""
    tensors, old = made_up.tensors(config, seed=seed), {}
    names = {
        "input_layernorm.weight": "ln_1.weight", "post_attention_layernorm.weight": "ln_2.weight",
        "self_attn.o_proj.weight": "attn.c_proj.weight", "mlp.up_proj.weight": "mlp.w1.weight",
        "mlp.gate_proj.weight": "mlp.w2.weight", "mlp.down_proj.weight": "mlp.c_proj.weight",
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        for name, theirs in names.items():
            old[f"transformer.h.{i}.{theirs}"] = tensors[f"model.layers.{i}.{name}"]
        for kind in ("weight", "bias"):
            thirds = [tensors[f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            old[f"transformer.h.{i}.attn.c_attn.{kind}"] = np.concatenate(thirds)
    old |= {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    fields = {
        "model_type": "qwen", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps, "rotary_emb_base": config.rope_theta, "rotary_pct": 1.0,
        "seq_length": 48, "max_position_embeddings": 128, "no_bias": True, "tie_word_embeddings": False,
        "use_dynamic_ntk": True, "use_logn_attn": True, "scale_attn_weights": True, "bf16": True,
    }  # fmt: skip
    return fields, old


def test_qwen_v1_is_the_same_model_in_other_boxes(tmp_path):
    config = tiny(tie_word_embeddings=False, num_key_value_heads=4, rms_norm_eps=1e-5)
    mesh = sharding.make_mesh(MESHES["data2-fsdp2-tensor2"])
    made_up.write(tmp_path / "v1", *v1(config))
    made_up.checkpoint(tmp_path / "qwen2", config, dtype=np.float32)
    (old, old_params), (new, new_params) = hf.load(tmp_path / "v1", mesh=mesh), hf.load(tmp_path / "qwen2")
    assert old == new.replace(v1_lengths=V1Lengths(48, use_dynamic_ntk=True, use_logn_attn=True))
    equal(old_params, new_params)


def test_tables_name_every_parameter_once(family):
    for model_type in ("qwen2", "qwen3"):
        rows = layouts.table(model_type, family, models.abstract(family))
        names = [name for entry, _ in rows for name in entry.names(family)]
        assert sorted(names) == sorted(made_up.tensors(family))


def test_the_package_is_light():
    code = (
        "import sys, qwen_jax.hf; "
        "heavy = [m for m in ('torch', 'transformers', 'safetensors', 'tensorflow', 'tyro') if m in sys.modules]; "
        "from jax._src import xla_bridge; assert not heavy and not xla_bridge.backends_are_initialized(), heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bfloat16_is_rounded_not_cut(tmp_path):
    folder = made_up.checkpoint(tmp_path, tiny(), dtype=np.float32)
    _, params = hf.load(folder, dtype="bfloat16")
    expected = made_up.tensors(tiny())["model.layers.1.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16).T
    equal(params["layers"]["mlp"]["up"]["kernel"][1], expected)
