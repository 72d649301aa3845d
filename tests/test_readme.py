"""The README's Python, taken out of it and run: what a reader pastes must work as it stands."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pretrain
from qwen_jax import hf, models, rollout, sharding, tokenizer
from qwen_jax.batches import LMBatch
from qwen_jax.sharding import MeshConfig
from tests.conftest import tiny

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
CHECKPOINT = "path/to/Qwen3-0.6B"


def run(mark: str, before: dict | None = None, **replaced: str) -> dict:
    """Runs the one block that has `mark` in it, with only what a block `before` it has left, and returns the names."""
    [block] = [block for block in BLOCKS if mark in block]
    for old, new in replaced.items():
        block = block.replace(old, new)
    names = {"__name__": "readme", **(before or {})}
    exec(compile(block, f"README.md ({mark})", "exec"), names)
    return names


def test_every_block_is_run_here():
    marks = ("hf.load", "samples=8", "small_long_warmup", "focal_loss")
    assert [sum(mark in block for mark in marks) for block in BLOCKS] == [1, 1, 1, 1]


def test_the_model_in_use(tmp_path, capsys):
    tok = tokenizer.train(["Hi there, how are you? I am well."] * 8, vocab_size=272)
    config = tiny(
        vocab_size=512,  # padding rows, as published ones have: they must not be sampled
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=True,
    )
    params = models.init(config, jax.random.key(1))
    hf.save(tmp_path, config, params)
    tok.save(tmp_path)
    names = run("hf.load", **{CHECKPOINT: str(tmp_path)})
    logits = np.asarray(names["logits"])
    assert logits.shape == (1, len(names["ids"]), config.vocab_size) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, models.forward(names["config"], params, jnp.array([names["ids"]])), atol=1e-5)
    assert isinstance(names["out"], rollout.Completions) and names["out"].tokens.shape == (1, 64)
    answer = np.asarray(names["out"].tokens)[0, : int(names["out"].lengths[0])].tolist()
    assert answer and capsys.readouterr().out == tok.decode(answer, skip_special=True) + "\n"
    several = run("samples=8", before=names)
    assert several["out"].tokens.shape == several["weight"].shape == (8, 64)


def test_the_variation():
    longer, small = run("small_long_warmup")["small_long_warmup"](), pretrain.small()
    assert longer.optimizer.warmup_steps == 4 * small.optimizer.warmup_steps
    assert dataclasses.replace(longer, optimizer=small.optimizer) == small
    pretrain.build(longer, sharding.make_mesh(MeshConfig()))  # the longer warm-up fits into the run


@pytest.fixture
def batch():
    """Eight rows of made-up tokens; the last row has no target, and is a microbatch of its own."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 272, (8, 65)).astype(np.int32)
    ones, positions = np.ones((8, 64), np.int32), np.tile(np.arange(64, dtype=np.int32), (8, 1))
    mask = rng.integers(0, 2, (8, 64)).astype(np.float32)
    mask[-1] = 0
    return LMBatch(tokens[:, :-1], tokens[:, 1:], mask, ones, positions)


def test_the_objective_takes_a_real_step(batch, monkeypatch):
    monkeypatch.setattr(pretrain, "language_model_loss", run("focal_loss")["focal_loss"])
    smoke = dataclasses.replace(pretrain.smoke(), microbatches=8)
    built = pretrain.build(smoke, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state = built.init(jax.random.key(0))
    old = jax.device_get(state.params)
    logits = models.forward(smoke.model, old, batch.tokens)
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), batch.targets[..., None], -1)[
        ..., 0
    ]
    state, found = built.train_step(state, sharding.put(batch, built.batch))
    count = batch.loss_mask.sum()
    assert found["weight"] == count
    np.testing.assert_allclose(found["nll"], -(batch.loss_mask * log_probs).sum() / count, rtol=1e-5)
    focal = -batch.loss_mask * log_probs * (1 - np.exp(log_probs)) ** 2
    np.testing.assert_allclose(found["loss"], focal.sum() / count, rtol=1e-5)
    assert found["skipped"] == 0 and found["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, jax.device_get(state.params), old)
    assert moved["embedding"] and moved["layers"]["mlp"]["down"]["kernel"]
