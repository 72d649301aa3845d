"""Logits and gradients are those the published code gave when the makers ran: the parity of machines without torch."""

import pathlib

import numpy as np
import pytest

from qwen_jax import hf
from tests.parity import ours
from tests.parity.batches import KINDS

HERE = pathlib.Path(__file__).parent


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


def test_gradients(golden, tmp_path):
    config, params, figures = golden
    tokens, segments = figures["packed/tokens"], figures["packed/segments"]
    loss, gradients = ours.loss_and_gradients(config, params, tokens, segments, tmp_path / "gradients")
    expected = {key.removeprefix("gradient/"): x for key, x in figures.items() if key.startswith("gradient/")}
    assert abs(loss - figures["loss"]) < 1e-5
    assert ours.worst_relative(gradients, expected) < 1e-4


def test_all_shapes_are_here():
    assert len(list(HERE.glob("*/figures.npz"))) == 5
