"""Logits and gradients are those the published code gave when the makers ran: the parity of machines without torch."""

import pathlib

import numpy as np
import pytest

from qwen_jax import hf, models
from tests.parity import ours
from tests.parity.batches import KINDS

HERE = pathlib.Path(__file__).parent
# Each kind of parameter once; the live parity compares the gradients of every shape.
WITH_GRADIENTS = ("qwen", "qwen2-tied", "qwen2_moe", "qwen3-tied-14-heads")


@pytest.fixture(scope="module", params=sorted(folder.parent.name for folder in HERE.glob("*/figures.npz")))
def golden(request):
    """Config, float32 parameters and figures of one folder."""
    config, params = hf.load(HERE / request.param, dtype="float32")
    with np.load(HERE / request.param / "figures.npz", allow_pickle=False) as figures:
        return config.replace(dtype="float32"), params, dict(figures)


def test_logits(golden):
    config, params, figures = golden
    for kind in KINDS:
        tokens, segments = figures[f"{kind}/tokens"], figures[f"{kind}/segments"]
        found = ours.logits(config, params, tokens, segments)
        assert ours.worst(found, figures[f"{kind}/logits"], segments) < 1e-4, kind


@pytest.mark.parametrize("golden", WITH_GRADIENTS, indirect=True)
def test_gradients(golden, tmp_path):
    config, params, figures = golden
    tokens, segments = figures["packed/tokens"], figures["packed/segments"]
    loss, gradients = ours.loss_and_gradients(config, params, tokens, segments, tmp_path / "gradients")
    expected = {key.removeprefix("gradient/"): x for key, x in figures.items() if key.startswith("gradient/")}
    assert abs(loss - figures["loss"]) < 1e-5
    assert ours.worst_relative(gradients, expected) < 1e-4


def test_qwen_v1_beyond_the_length_of_its_training_whole_and_decoded():
    """Dynamic NTK and LogN of the published code: 160 tokens by a model of 64; behind a prompt of 80 one by one."""
    config, params = hf.load(HERE / "qwen", dtype="float32")
    config = config.replace(dtype="float32")
    with np.load(HERE / "qwen" / "figures.npz", allow_pickle=False) as figures:
        tokens, whole, decoded = (figures[f"long/{name}"] for name in ("tokens", "logits", "decoded"))
    np.testing.assert_allclose(models.forward(config, params, tokens), whole, atol=1e-4)
    behind = models.forward(config, params, tokens, prompt_lengths=np.full_like(tokens, 80))
    np.testing.assert_allclose(behind[:, 80:], decoded, atol=1e-4)
    assert np.abs(whole[:, 80:] - decoded).max() > 1  # the decoded ones keep the prompt's base


def test_all_shapes_are_here():
    assert len(list(HERE.glob("*/figures.npz"))) == 7
