"""peft folders: what is written is read again, what does not fit is refused, merging is what joining is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import hf, models
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.hf import convert
from tests.conftest import tiny
from tests.hf import made_up

CONFIG = tiny(tie_word_embeddings=False)


def adapter(lora: LoraConfig, config=CONFIG, seed=0) -> hf.Adapter:
    """One in which nothing has its first value."""
    draw = np.random.default_rng(seed).normal
    shapes = models.lora.abstract(config, lora)
    return hf.Adapter(lora, jax.tree.map(lambda x: jnp.asarray(draw(0, 0.2, x.shape), jnp.float32), shapes))


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=3, alpha=5.0, dropout=0.1, rslora=True),
        LoraConfig(rank=2, dora=True, targets=("o", "gate")),
        LoraConfig(rank=2, row_ids=(9, 4), targets=("q",)),
    ],
)
def test_what_is_saved_is_loaded(lora, tmp_path):
    made = adapter(lora)
    for _ in range(2):  # the second replaces the first
        hf.save_adapter(tmp_path / "adapter", CONFIG, made, base="somewhere")
    found = hf.load_adapter(tmp_path / "adapter", CONFIG)
    assert found.lora == lora
    jax.tree.map(np.testing.assert_array_equal, found.tree, made.tree)
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"
    )


def test_a_tensor_is_where_and_how_peft_has_it(tmp_path):
    """By hand: y = x·Aᵀ·Bᵀ with A [r, in], B [out, r], heads outermost in out."""
    made = adapter(LoraConfig(rank=2, targets=("q", "o")))
    hf.save_adapter(tmp_path / "adapter", CONFIG, made)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.self_attn."
    q, o = made.tree["layers"]["attention"]["q"], made.tree["layers"]["attention"]["o"]
    np.testing.assert_array_equal(held[f"{place}q_proj.lora_A.weight"], q["a"][1].T)
    np.testing.assert_array_equal(held[f"{place}q_proj.lora_B.weight"], q["b"][1].reshape(2, -1).T)
    np.testing.assert_array_equal(held[f"{place}o_proj.lora_A.weight"], o["a"][1].reshape(-1, 2).T)
    assert len(held) == 8


def test_packed_adapters_of_qwen_v1_serve_q_k_and_v(tmp_path):
    """c_attn has one A and a B of three parts; c_proj is two things by where it is."""
    config = tiny(num_key_value_heads=4, tie_word_embeddings=False)
    draw, D, F = np.random.default_rng(0).normal, config.hidden_size, config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    shapes = {"attn.c_attn": (3 * inner, D), "attn.c_proj": (D, inner), "mlp.w1": (F, D), "mlp.c_proj": (D, F)}
    held = {}
    for i in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            place = f"base_model.model.transformer.h.{i}.{name}"
            held[f"{place}.lora_A.weight"] = draw(0, 1, (2, columns)).astype(np.float32)
            held[f"{place}.lora_B.weight"] = draw(0, 1, (rows, 2)).astype(np.float32)
    whole = {name: draw(0, 1, (256, D)).astype(np.float32) for name in ("transformer.wte", "lm_head")}
    held |= {f"base_model.model.{name}.weight": x for name, x in whole.items()}
    save_file(held, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
    found = hf.load_adapter(tmp_path, config)
    assert found.lora.targets == ("q", "k", "v", "o", "up", "down") and len(found.lora.row_ids) == 256
    params = models.init(config, jax.random.key(0))
    merged = found.merge(params)
    attn = "base_model.model.transformer.h.1.attn.c_attn"
    product = 0.5 * held[f"{attn}.lora_B.weight"] @ held[f"{attn}.lora_A.weight"]
    for part, name in enumerate("qkv"):
        expected = product.reshape(3, 4, 16, D)[part].transpose(2, 0, 1)
        change = merged["layers"]["attention"][name]["kernel"] - params["layers"]["attention"][name]["kernel"]
        np.testing.assert_allclose(change[1], expected, atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], whole["transformer.wte"])
    np.testing.assert_array_equal(merged["head"], whole["lm_head"])


@pytest.mark.parametrize("lora", [LoraConfig(rank=3, row_ids=(5, 250)), LoraConfig(rank=2, dora=True)])
def test_convert_merges_an_adapter(lora, tmp_path):
    made_up.checkpoint(tmp_path / "base", CONFIG, dtype=np.float32)
    made = adapter(lora)
    hf.save_adapter(tmp_path / "adapter", CONFIG, made)
    assert convert.main([str(tmp_path / "base"), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")]) == 0
    config, params = hf.load(tmp_path / "base")
    expected, found = made.merge(params), hf.load(tmp_path / "out")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_several_adapters_share_one_base(tmp_path):
    params, ids = models.init(CONFIG, jax.random.key(0)), jnp.arange(8)[None]
    for seed, name in enumerate(("chat", "code")):
        hf.save_adapter(tmp_path / name, CONFIG, adapter(LoraConfig(rank=2), seed=seed))
    adapters = {name: hf.load_adapter(tmp_path / name, CONFIG) for name in ("chat", "code")}
    found = {name: models.forward(CONFIG, adapters[name].join(params), ids) for name in adapters}
    for name, logits in found.items():
        np.testing.assert_allclose(logits, models.forward(CONFIG, adapters[name].merge(params), ids), atol=2e-5)
    assert np.abs(found["chat"] - found["code"]).max() > 0.01
    joined = adapters["chat"].join(params)
    assert joined["embedding"] is params["embedding"]


def change(**fields):
    def of_config(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return of_config


def of_tensors(edit):
    def rewrite(folder):
        file = folder / "adapter_model.safetensors"
        held = load_file(file)
        edit(held)
        save_file(held, file)

    return rewrite


PLACE = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (change(peft_type="LOHA"), "is of peft_type 'LOHA'; expected LORA"),
        (change(bias="all"), "bias = 'all', not computed here"),
        (change(rank_pattern={"q_proj": 4}), "rank_pattern = .*not computed here"),
        (change(use_dora=True), "missing, unexpected or mis-shaped: .*magnitude"),
        (change(r=5), "q_proj.lora_A.weight is .*; the model wants"),
        (of_tensors(lambda held: held.pop(PLACE)), "layers.0.self_attn.q_proj.lora_A.weight but not every layer"),
        (
            of_tensors(lambda held: held.update(other=held[PLACE])),
            "holds other; expected adapters of this model's layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(damage, message, tmp_path):
    hf.save_adapter(tmp_path / "adapter", CONFIG, adapter(LoraConfig(rank=2, targets=("q",))))
    damage(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        hf.load_adapter(tmp_path / "adapter", CONFIG)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(InputError, match="holds no adapter_config.json, so it is not replaced"):
        hf.save_adapter(tmp_path, CONFIG, adapter(LoraConfig(rank=1)))
