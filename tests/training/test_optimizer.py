"""Schedules as published, and what weight decay leaves alone."""

import jax
import numpy as np
import pytest

from qwen_jax import models
from qwen_jax.errors import InputError
from qwen_jax.training import optimizer
from qwen_jax.training.optimizer import OptimizerConfig
from tests.conftest import tiny


def rates(steps, **fields):
    schedule = optimizer.make_schedule(OptimizerConfig(peak_lr=1.0, **fields), steps)
    return np.array([float(schedule(step)) for step in range(steps)])


def test_warm_up_then_constant():
    np.testing.assert_allclose(rates(6, warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1])


def test_no_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(rates(3), [1, 1, 1])


def test_cosine_falls_from_the_last_step_of_warm_up_to_the_floor_at_the_last_step():
    found = rates(104, warmup_steps=4, schedule="cosine", final_ratio=0.1)
    progress = np.arange(101) / 100
    np.testing.assert_allclose(found[3:], 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2, atol=1e-6)
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1])


def test_cosine_without_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(
        rates(5, schedule="cosine"), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0], atol=1e-6
    )


def test_warm_up_stable_decay():
    found = rates(12, warmup_steps=2, decay_steps=4, schedule="wsd", final_ratio=0.2)
    np.testing.assert_allclose(found, [0.5] + [1] * 7 + [0.8, 0.6, 0.4, 0.2], atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_floor_is_the_rate_of_the_last_step(schedule, warmup):
    """Also where the fall takes all that warm-up leaves; afterwards nothing falls further."""
    decay = dict(decay_steps=10 - warmup) if schedule == "wsd" else {}
    found = rates(10, warmup_steps=warmup, schedule=schedule, final_ratio=0.1, **decay)
    np.testing.assert_allclose(found[-1], 0.1, atol=1e-7)
    np.testing.assert_allclose(found[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), atol=1e-6)
    assert (np.diff(found[max(warmup - 1, 0) :]) < 0).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(warmup_steps=11), "warmup_steps is 11, more than the 10 steps"),
        (dict(schedule="wsd"), "decay_steps is 0; expected 1 to 10"),
        (dict(schedule="wsd", warmup_steps=5, decay_steps=6), "decay_steps is 6; expected 1 to 5"),
        (dict(schedule="linear"), "'linear'; expected constant, cosine or wsd"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        rates(10, **fields)


def test_decay_is_on_matrices_only():
    model = tiny(qk_norm=True, tie_word_embeddings=False)
    decayed = optimizer.decayed(models.abstract(model))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, on in jax.tree.leaves_with_path(decayed) if on
    }
    assert found == {
        "embedding", "head", "layers/attention/k/kernel", "layers/attention/o/kernel", "layers/attention/q/kernel",
        "layers/attention/v/kernel", "layers/mlp/down/kernel", "layers/mlp/gate/kernel", "layers/mlp/up/kernel",
    }  # fmt: skip


@pytest.mark.parametrize("field, value", [("peak_lr", float("nan")), ("warmup_steps", -5), ("b2", 1.0), ("eps", -1e-8)])
def test_a_number_that_cannot_be_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"optimizer.{field} is {value}"):
        OptimizerConfig(**{field: value})
