"""Expert training: where it starts, what it is tested on, that the test's figures are the model's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import moe, pretrain
from qwen_jax import config, hf, models, sharding, tokenizer
from qwen_jax.data import packing
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import checkpoint

SMOKE = moe.smoke()
DENSE = config.get("qwen2-0.5b").replace(
    vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train((f"{n} plus {m} is {n + m}." for n in range(60) for m in range(9)), 262)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run over eight devices."""
    folder = tmp_path_factory.mktemp("moe") / "run"
    mesh = MeshConfig(fsdp=8)
    return folder, moe.run(dataclasses.replace(SMOKE, mesh=mesh), folder, "smoke")


def test_the_tested_loss_is_that_of_the_trained_model(finished):
    """Against whole logits of the saved model on one device, over the test split's rows."""
    folder, tested = finished
    model, params = checkpoint.load_params(folder)
    rows = pretrain.text_rows(SMOKE, tokenizer.load(folder / "tokenizer"), "made-up", "test").first(SMOKE.test_rows)
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    logits = models.forward(model, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    found = tested["made-up"]
    assert found.tokens == batch.loss_mask.sum() > 0
    assert found.nats == pytest.approx(float((nats * batch.loss_mask).sum() / found.tokens), abs=1e-4)
    np.testing.assert_array_equal(found.counts.sum(-1), [2 * (batch.segment_ids > 0).sum()] * 2)  # 2 experts a token
    assert (found.counts.max(-1) > found.counts.min(-1)).all()


def test_the_report_has_the_test(finished):
    folder, tested = finished
    found = tested["made-up"]
    text = (folder / "test.md").read_text()
    assert f"| made-up | {found.nats:.4f} | {found.tokens:,} |" in text
    share = found.counts[1] / found.counts[1].sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(8)
    assert f"| 1 | {entropy:.4f} | {8 * share.max():.2f} | {8 * share.min():.2f} |" in text
    kept = json.loads((folder / "test.json").read_text())["made-up"]
    assert kept == {"nats": found.nats, "tokens": found.tokens, "counts": found.counts.tolist()}
    assert (folder / "plots" / "router.png").read_bytes()[:4] == b"\x89PNG"


def start(run, folder):
    """The config as it is resolved, and its parameters of step 0."""
    run = moe.from_base(run, folder)
    built = moe.build(run, sharding.make_mesh(run.mesh))
    return run, jax.device_get(moe.initial(run, built).params)


@pytest.mark.parametrize("how", [dict(), dict(shuffle=False, reinitialize=0.0)], ids=str)
def test_a_dense_base_is_upcycled_to_the_recipes_experts(how, tok, tmp_path):
    params = models.init(DENSE, jax.random.key(1))
    hf.save(tmp_path / "base", DENSE, params)
    tok.save(tmp_path / "base")
    asked = dataclasses.replace(
        SMOKE, base=str(tmp_path / "base"), upcycling=moe.Upcycling(**how), mesh=MeshConfig(expert=2, fsdp=4)
    )
    run, found = start(asked, tmp_path / "run")
    assert (run.model.num_experts, run.model.hidden_size, run.model.qkv_bias) == (8, 32, True)
    expected = models.upcycle(DENSE, params, run.model, jax.random.key(SMOKE.seed), **how)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jax.device_get(expected))


@pytest.mark.parametrize("experts", [dict(), dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16)])
def test_a_base_with_experts_and_a_dense_run_start_as_the_base_is(experts, tok, tmp_path):
    model = DENSE.replace(**experts, qkv_bias=False, qk_norm=True)
    params = models.init(model, jax.random.key(1))
    hf.save(tmp_path / "base", model, params)
    tok.save(tmp_path / "base")
    none = dict(num_experts=0, num_experts_per_tok=0)
    asked = SMOKE if experts else dataclasses.replace(SMOKE, model=SMOKE.model.replace(**none))
    run, found = start(dataclasses.replace(asked, base=str(tmp_path / "base")), tmp_path / "run")
    assert run.model.num_experts == model.num_experts
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))


def test_a_mixture_is_rows_of_each_source_and_tested_apart(tok):
    run = dataclasses.replace(SMOKE, dataset="made-up:1,python-code:3", test_rows=4)
    train, validation = pretrain.rows(run, tok)
    assert isinstance(train, packing.MixedRows) and train.weights == (1, 3)
    alone = pretrain.text_rows(run, tok, "made-up", "train")
    assert len(train.parts[0]) == len(alone)
    jax.tree.map(np.testing.assert_array_equal, train.parts[0][0], alone[0])
    assert {name: len(each) for name, each in validation.items()} == {"made-up": 2, "python-code": 6}
    assert {name: len(each) for name, each in moe.test_rows(run, tok).items()} == {"made-up": 4, "python-code": 4}
    together = pretrain.rows(dataclasses.replace(run, dataset="made-up,python-code"), tok)[0]
    assert isinstance(together, packing.StreamRows) and together.tokens == train.tokens


def test_files_without_a_test_split_need_one_named(tok, tmp_path):
    chat = [{"role": "user", "content": "1 plus"}, {"role": "assistant", "content": "2 is 3."}]
    for name, count in (("train.jsonl", 90), ("test.jsonl", 3)):
        (tmp_path / name).write_text("\n".join(json.dumps({"messages": chat}) for _ in range(count)))
    run = dataclasses.replace(SMOKE, dataset=str(tmp_path / "train.jsonl"))
    with pytest.raises(InputError, match="no split 'test'; expected one of train, validation"):
        moe.test_rows(run, tok)
    named = dataclasses.replace(run, test_dataset=str(tmp_path / "test.jsonl"), test_rows=1)
    ((name, (row,)),) = moe.test_rows(named, tok).items()
    assert name == "test" and row.segment_ids.max() == 3  # the file is read whole
