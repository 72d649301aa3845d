"""The staged recipe and the comparison of ways to read further: their smokes reach a report of true figures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import long_context, pretrain
from experiments.ablations import length_extrapolation
from qwen_jax import models, sharding, tokenizer
from qwen_jax.data import conversations, long_text, sources
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import checkpoint


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]])


def held_out(folder):
    """The validation text as the runs must have joined it, and its tokenizer's ids."""
    tok = tokenizer.load(folder / "tokenizer")
    texts = [conversations.plain_text(chat) for chat in sources.load("made-up", "validation")]
    order, end = np.random.default_rng(0).permutation(len(texts)), tok.special_tokens["<|endoftext|>"]
    return np.concatenate([[*tok.encode(texts[i]), end] for i in order])


def loss(model, params, ids, length):
    """Of a text in rows of `length`, each read from its first token on; the next row's first is predicted too."""
    tokens, targets = ids[:-1].reshape(-1, length), ids[1:].reshape(-1, length)
    log_probs = jax.nn.log_softmax(models.forward(model, params, jnp.asarray(tokens, jnp.int32)))
    return -float(np.take_along_axis(np.asarray(log_probs), targets[..., None], -1).mean())


def test_each_stage_goes_on_from_the_one_before_and_is_scored_at_every_length(tmp_path, capsys):
    config, folder = long_context.smoke(), tmp_path / "run"
    still = config.stages[0], dataclasses.replace(config.stages[1], peak_lr=0.0)
    config = dataclasses.replace(config, stages=still)
    losses = long_context.run(config, folder, "smoke")
    first, second = (folder / name for name in ("stage_0_32", "stage_1_64"))
    (model, params), (last_model, last) = checkpoint.load_params(first), checkpoint.load_params(second)
    jax.tree.map(np.testing.assert_array_equal, params, last)  # a learning rate of 0 shows what the stage began with
    assert (model.rope_theta, last_model.rope_theta, last_model.max_position_embeddings) == (1e4, 1e5, 64)
    scored = held_out(folder)[: config.scored_tokens + 1]
    for length, found, found_later in zip((32, 64), *losses, strict=True):
        wide = dict(max_position_embeddings=64)
        assert found == pytest.approx(loss(model.replace(**wide), params, scored, length), abs=1e-4)
        assert found_later == pytest.approx(loss(last_model, params, scored, length), abs=1e-4)
    report = (folder / "report.md").read_text()
    assert f"| 64 | 100,000 | 2 | 1,024 | 75% | {losses[1][0]:.4f} | {losses[1][1]:.4f} |" in report
    assert json.loads((folder / "losses.json").read_text()) == losses
    assert capsys.readouterr().out.count("making the parameters of step 0") == 2


@pytest.mark.parametrize("name", [name for name in long_context.RECIPES if name != "smoke"])
def test_stages_resolve_at_full_size_without_touching_a_device(name):
    config = long_context.RECIPES[name]()
    for stage in config.stages:
        built = pretrain.build(
            long_context.stage_config(config, stage), sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
        )
        assert built.batch.tokens.shape == (stage.batch_size, stage.length)
    published = {4096: 1e4, 32_768: 1e6, 65_536: 1e6, 131_072: 5e6, 262_144: 1e7}
    assert name == "small" or {stage.length: stage.rope_theta for stage in config.stages} == published


@pytest.mark.parametrize("lengths", ((64, 32), (64, 64), (32, 96)))
def test_stages_that_do_not_grow_or_do_not_divide_the_scored_text_are_refused(lengths, tmp_path):
    smoke = long_context.smoke()
    stages = tuple(dataclasses.replace(stage, length=n) for stage, n in zip(smoke.stages, lengths, strict=True))
    with pytest.raises(InputError, match=f"the stages' lengths are .{lengths[0]}, {lengths[1]}.; expected"):
        long_context.run(dataclasses.replace(smoke, stages=stages), tmp_path / "run", "smoke")


def test_one_model_is_scored_in_every_way_and_nothing_is_scored_twice(tmp_path, monkeypatch, capsys):
    config, folder = length_extrapolation.smoke(), tmp_path / "run"
    results = length_extrapolation.run(config, folder, "smoke")
    model, params = checkpoint.load_params(folder / "trained")
    ids, tok = held_out(folder / "trained"), tokenizer.load(folder / "trained" / "tokenizer")
    scored = ids[: config.scored_tokens + 1]
    for length in config.lengths:
        readers = length_extrapolation.ways(model, 128, length, config.local_share)
        assert list(readers) == list(results) == ["none", "dynamic NTK", "YaRN", "DCA", "DCA + temperature"]
        found = {way: results[way][str(length)] for way in results}
        assert found["DCA"]["loss"] == pytest.approx(loss(readers["DCA"], params, scored, length), abs=1e-5)
        if length == 128:  # up to the length of training all are the same model
            assert len({round(score["loss"], 4) for score in found.values()}) == 1
    first, second = results["DCA"]["256"]["loss_by_position"]
    assert (first + second) / 2 == pytest.approx(results["DCA"]["256"]["loss"], abs=1e-5)
    text = conversations.Document(ids, np.ones(len(ids), bool))
    [*keys] = long_text.passkeys(text, tok, [256] * config.passkeys, seed=1, spread=True)
    rows = jnp.asarray([key.ids for key in keys], jnp.int32)
    right = np.argmax(models.forward(readers["YaRN"], params, rows), -1)[:, -6:-1] == np.asarray(rows)[:, -5:]
    assert results["YaRN"]["256"]["digits"] == pytest.approx(right.mean())

    report = (folder / "report.md").read_text()
    assert (
        f"| DCA | {np.exp(results['DCA']['128']['loss']):.2f} | {np.exp(results['DCA']['256']['loss']):.2f} |" in report
    )
    assert (folder / "plots" / "length_extrapolation.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(length_extrapolation, "score", lambda *arguments: pytest.fail("scored again"))
    assert length_extrapolation.run(config, folder, "smoke") == results
    assert "nothing to train" in capsys.readouterr().out


def test_lengths_that_begin_elsewhere_than_training_are_refused(tmp_path):
    smoke = dataclasses.replace(length_extrapolation.smoke(), lengths=(64, 256))
    with pytest.raises(InputError, match="the length of training, 128, on"):
        length_extrapolation.run(smoke, tmp_path / "run", "smoke")
    assert not (tmp_path / "run").exists()
