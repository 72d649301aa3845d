"""Every experiment: its smoke takes two steps and agrees on every mesh, its published recipes resolve at full size."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import dpo, moe, pretrain, quickstart, reward_model, sft
from qwen_jax import chat, config, hf, models, sharding, tokenizer
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.ops import quantisation
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import checkpoint, export, metrics, pretrained, samples, workdir
from qwen_jax.training.samples import SamplesConfig
from tests.conftest import MESHES

TRAINING = {"pretrain": pretrain, "sft": sft, "reward_model": reward_model, "dpo": dpo}
FULL_SIZE = [(module, recipe) for module in TRAINING.values() for recipe in module.RECIPES if recipe != "smoke"]
FULL_SIZE += [(moe, "small"), (moe, "qwen2-57b-a14b")]  # the others differ in a number or a name


SMALL = dict(
    vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


def losses(folder):
    return [(row.get("loss"), row.get("validation/loss")) for row in metrics.read(folder)]


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory):
    """A smoke run on a mesh of one device in use: everything on the data axis would still be split, so size 1."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    module = TRAINING[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: [jax.local_devices()[0]])
        module.run(module.smoke(), folder, "smoke")
    return module, losses(folder)


# Every experiment is trained on a mesh, every mesh trains an experiment.
@pytest.mark.parametrize(
    "alone, mesh",
    [
        ("pretrain", "fsdp8"),
        ("sft", "fsdp2-context2-tensor2"),
        ("reward_model", "fsdp2-context2-tensor2"),
        ("dpo", "data2-fsdp2-tensor2"),
    ],
    indirect=["alone"],
)
def test_smoke_trains_alike_on_every_mesh(alone, mesh, tmp_path):
    module, expected = alone
    module.run(dataclasses.replace(module.smoke(), mesh=MESHES[mesh]), tmp_path / "run", "smoke")
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == 5
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert (tmp_path / "run" / "report.md").read_text().startswith("# ")
    assert (tmp_path / "run" / "plots" / "loss.png").stat().st_size > 5000


def test_quickstart_smoke_reaches_its_report(one_device, tmp_path, capsys):
    quickstart.run(quickstart.smoke(), tmp_path / "run", "smoke")
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| pretrain |" in text and "| sft |" in text and "| What is 3 plus 4? |" in text
    assert "Of 40 held-out pairs (made-up-pairs) it ranks" in text
    assert "answers to held-out prompts was" in text and "## Answers before and after" in text
    scorer, _ = checkpoint.load_params(tmp_path / "run" / "reward")
    assert scorer.head == "score" and pretrained.tokenizer_path(tmp_path / "run" / "reward").exists()
    assert workdir.read(tmp_path / "run" / "reward")["config"]["base"] == str(tmp_path / "run" / "sft")
    assert "done: " in capsys.readouterr().out


@pytest.mark.parametrize("module, recipe", FULL_SIZE, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_recipes_lower_at_full_size_without_touching_a_device(module, recipe):
    config = module.RECIPES[recipe]()
    mesh = MeshConfig(fsdp=2, tensor=4) if "qwen" in recipe else MeshConfig(data=2, fsdp=4)
    if config.batch_size < 8:
        mesh = MESHES["fsdp2-context2-tensor2"]
    built = module.build(config, sharding.make_mesh(mesh))
    traced = built.train_step.trace(built.state, built.batch, *built.frozen)
    state, figures = traced.out_info
    jax.tree.map(lambda new, old: new.shape == old.shape or pytest.fail(f"{new} {old}"), state, built.state)
    assert figures["loss"].shape == ()
    if "qwen" in recipe:  # the published ones; kernels and all, as far as this goes without a compiler for TPUs
        kernels = traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
        assert kernels >= 3


def test_a_row_longer_than_the_model_can_read_is_refused():
    with pytest.raises(InputError, match="length is 2048, over model.max_position_embeddings 1024"):
        pretrain.build(dataclasses.replace(pretrain.smoke(), length=2048), sharding.make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
    """A base that has read text only."""
    folder = tmp_path_factory.mktemp("base") / "run"
    pretrain.run(pretrain.smoke(), folder, "smoke")
    return folder


def test_lora_trains_adapters_and_control_rows_beside_a_run_and_goes_on_after_a_stop(pretrained_run, tmp_path, capsys):
    smoke = dataclasses.replace(
        sft.smoke(), base=str(pretrained_run), lora=LoraConfig(rank=2, dropout=0.1), dropout=0.1,
        samples=SamplesConfig(prompts=2, max_new_tokens=4),
        optimizer=dataclasses.replace(sft.smoke().optimizer, peak_lr=0.1),
    )  # fmt: skip
    sft.run(dataclasses.replace(smoke, mesh=MESHES["fsdp2-context2-tensor2"]), tmp_path / "run", "smoke")
    model, kept = checkpoint.load_params(tmp_path / "run")
    tok = tokenizer.load(tmp_path / "run" / "tokenizer")
    marks = [tok.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>")]
    assert kept["rows"]["embedding"].shape == (2, model.hidden_size) and set(kept) == {"layers", "rows"}
    # Base and adapters are read as one model, which is the base that the adapter's folder says, adapted.
    abstract = sft.build(dataclasses.replace(smoke, lora=LoraConfig()), sharding.make_mesh(MeshConfig())).state.params
    base = pretrained.load_params(pretrained_run, abstract)
    tuned = pretrained.load_params(tmp_path / "run", abstract)
    adapter = hf.load_adapter(tmp_path / "run" / "adapter", model)
    assert list(adapter.lora.row_ids) == sorted(marks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned, adapter.merge(jax.device_get(base)))
    assert np.abs(tuned["layers"]["mlp"]["up"]["kernel"] - base["layers"]["mlp"]["up"]["kernel"]).max() > 1e-3
    moved = np.abs(np.asarray(tuned["embedding"]) - np.asarray(base["embedding"])).max(axis=1) > 0
    assert sorted(np.flatnonzero(moved)) == sorted(marks)
    assert chat.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "Hi", "--max-new-tokens", "2"]) is None
    capsys.readouterr()
    kept = samples.read(tmp_path / "run")
    assert list(kept) == [0, 2] and [len(of_one) for of_one in kept.values()] == [2, 2]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| --lora.rank | 0 | 2 |" in text and "| --optimizer.peak-lr | 0.001 | 0.1 |" in text
    assert "| made-up | \\<\\|im\\_start\\|>system⏎" in text
    sft.run(dataclasses.replace(smoke, mesh=MESHES["fsdp2-context2-tensor2"]), tmp_path / "run", "smoke")
    assert "already at step 2 of 2" in capsys.readouterr().out


def test_a_q_lora_run_from_nothing_is_one_model_to_chat_and_to_export(tmp_path, capsys, one_device):
    """Adapters beside random parameters in four bits: what is read is what the codes stand for, with A·B added."""
    smoke = dataclasses.replace(sft.smoke(), lora=LoraConfig(rank=2, quantised="nf4"))
    sft.run(smoke, tmp_path / "run", "smoke")
    assert chat.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "Hi", "--max-new-tokens", "2"]) is None
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model, params = hf.load(tmp_path / "out")
    whole = models.init(smoke.model, jax.random.key(smoke.seed), mesh=sharding.make_mesh(smoke.mesh))
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "run" / "base")[1], whole)
    adapter = hf.load_adapter(tmp_path / "run" / "adapter", model)
    expected = adapter.merge(quantisation.dequantise_tree(models.lora.quantise(whole, smoke.lora)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    ids = tokenizer.load(tmp_path / "out").encode("What is 3 plus 4?")
    assert ids == tokenizer.load(tmp_path / "run" / "tokenizer").encode("What is 3 plus 4?")
    capsys.readouterr()
    assert export.main([str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "is a Hugging Face folder already" in capsys.readouterr().err


def test_frozen_control_rows_of_a_base_that_has_not_learned_them_are_refused(pretrained_run, tmp_path):
    lora = LoraConfig(rank=2, control_rows="freeze")
    with pytest.raises(InputError, match=r"has not learned .*<\|im_end\|>.* could not end an answer"):
        sft.run(dataclasses.replace(sft.smoke(), base=str(pretrained_run), lora=lora), tmp_path / "run", "smoke")


def test_fine_tuning_needs_a_base_that_is_one(tmp_path):
    smoke = dataclasses.replace(sft.smoke(), base="")
    with pytest.raises(InputError, match="--base is missing"):
        sft.run(smoke, tmp_path / "run", "smoke")
    with pytest.raises(
        InputError, match="nowhere/config.json is missing; expected a Hugging Face folder or the workdir"
    ):
        sft.run(dataclasses.replace(smoke, base="nowhere"), tmp_path / "run", "smoke")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file/config.json is missing"):
        sft.run(dataclasses.replace(smoke, base=str(tmp_path / "file")), tmp_path / "run", "smoke")


def test_a_mistake_found_late_does_not_keep_the_folder(tmp_path):
    smoke = pretrain.smoke()
    with pytest.raises(InputError, match="seed is -1; expected 0 or more"):
        pretrain.run(dataclasses.replace(smoke, seed=-1), tmp_path / "run", "smoke")
    with pytest.raises(InputError, match="no data set is called 'chitchatt': it is none of chitchat, made-up,"):
        pretrain.run(dataclasses.replace(smoke, dataset="chitchatt"), tmp_path / "other", "smoke")
    one = dataclasses.replace(smoke, loop=dataclasses.replace(smoke.loop, steps=1))
    pretrain.run(one, tmp_path / "other", "smoke")
    assert metrics.read(tmp_path / "other")[-1]["step"] == 1


def test_a_tokenizer_is_kept_whole_or_not_at_all(tmp_path):
    folder, made = tmp_path / "tokenizer", []

    class Stopped(tokenizer.ByteBPE):
        def save(self, target, **options):
            super().save(target, **options)
            raise KeyboardInterrupt

    def make():
        made.append(1)
        return tokenizer.train((f"{n} and {m}" for n in range(60) for m in range(9)), 262)

    stopped = make()
    stopped.__class__ = Stopped
    with pytest.raises(KeyboardInterrupt):
        pretrained.keep_tokenizer(folder, lambda: stopped, at_most=262)
    assert not folder.exists()
    with pytest.raises(InputError, match="has 262 tokens, model.vocab_size is 261; expected at least as many"):
        pretrained.keep_tokenizer(folder, make, at_most=261)
    assert not folder.exists()
    for _ in range(2):
        assert pretrained.keep_tokenizer(folder, make, at_most=262).vocab_size == 262
    assert len(made) == 3  # what is kept is not made again


def test_fine_tuning_starts_from_a_published_folder(tmp_path, capsys):
    """The road of a real run: a Hugging Face folder decides the shape, the recipe how it is computed."""
    model = config.get("qwen3-0.6b").replace(**SMALL)
    params = models.init(model, jax.random.key(1))
    hf.save(tmp_path / "base", model, params)
    tokenizer.train((f"{n} plus {m} is {n + m}." for n in range(60) for m in range(9)), 262).save(tmp_path / "base")
    smoke = sft.smoke()
    loop = dataclasses.replace(smoke.loop, steps=1)
    still = dataclasses.replace(smoke.optimizer, peak_lr=0.0)
    run = dataclasses.replace(smoke, base=str(tmp_path / "base"), optimizer=still, loop=loop, mesh=MeshConfig(fsdp=8))
    run = dataclasses.replace(run, length=256, rows="buckets")
    sft.run(run, tmp_path / "run", "smoke")
    assert "the train step on rows of 256" in (told := capsys.readouterr().out) and "on rows of 128" in told
    found, tuned = checkpoint.load_params(tmp_path / "run")
    assert found == model.replace(dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, tuned, params)  # a learning rate of 0 shows what training began with
    # A run that has begun no longer needs its base.
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    sft.run(run, tmp_path / "run", "smoke")
    assert "already at step 1 of 1" in capsys.readouterr().out
