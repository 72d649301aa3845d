"""Checkpoints: the newest and the best are kept, any mesh reads them, a damaged one is passed over."""

import json

import jax
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import checkpoint, workdir
from qwen_jax.training.checkpoint import Checkpoints
from tests.training import lm


@pytest.fixture(scope="module")
def built():
    return lm.build(sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))


@pytest.fixture(scope="module")
def state(built):
    return built.init(jax.random.key(3))


def at(state, step):
    return state._replace(step=np.int32(step))


def fill(folder, state, losses):
    """Saves one checkpoint a loss, at steps 1, 2, ...; None is a checkpoint without an evaluation."""
    checkpoints = Checkpoints(folder, keep=2)
    for step, loss in enumerate(losses, 1):
        scores = None if loss is None else {"validation/loss": loss}
        checkpoints.save(at(state, step), {"next_index": step}, scores)
    return checkpoints


def test_the_newest_and_the_best_are_kept_over_reopening(tmp_path, state):
    fill(tmp_path, state, [5.0, 1.0, 2.0, None]).close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [2, 3, 4] and checkpoints.best() == 2
    checkpoints.save(at(state, 5), {"next_index": 5}, {"validation/loss": 0.5})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [4, 5] and checkpoints.best() == 5
    checkpoints.close()


def test_another_mesh_reads_the_same_state(tmp_path, state):
    fill(tmp_path, state, [1.0]).close()
    other = lm.build(sharding.make_mesh(MeshConfig(fsdp=4, context=2)))
    checkpoints = Checkpoints(tmp_path)
    restored, data, complaints = checkpoints.restore(other.state)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a.sharding}"), restored, other.state)
    assert (int(restored.step), data, complaints) == (1, {"next_index": 1}, [])


def test_nothing_saved_is_none(tmp_path, built):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(built.state) is None
    checkpoints.close()


def damage(folder, step):
    for path in (folder / "checkpoints" / str(step) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 40:
            path.write_bytes(path.read_bytes()[:20])


def test_a_damaged_checkpoint_is_passed_over_with_a_complaint(tmp_path, built, state):
    fill(tmp_path, state, [1.0, 2.0]).close()
    damage(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path)
    restored, data, complaints = checkpoints.restore(built.state)
    assert int(restored.step) == 1 and data == {"next_index": 1}
    assert len(complaints) == 1 and "checkpoints/2 cannot be read" in complaints[0]
    checkpoints.close()
    assert list((tmp_path / "checkpoints").glob("damaged-2-*"))  # out of the way, not deleted


def test_where_no_checkpoint_can_be_read_all_are_told_and_left_alone(tmp_path, built, state):
    fill(tmp_path, state, [1.0, 2.0]).close()
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="checkpoints/2 cannot be read.*checkpoints/1 cannot be read"):
        checkpoints.restore(built.state)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_steps_trained_again_after_a_damaged_checkpoint_are_saved(tmp_path, built, state):
    fill(tmp_path, state, [1.0, 2.0]).close()
    damage(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(built.state)
    checkpoints.save(at(state, 2), {"next_index": 22}, {"validation/loss": 0.5})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored, data, complaints = checkpoints.restore(built.state)
    assert (int(restored.step), data, complaints) == (2, {"next_index": 22}, [])
    with pytest.raises(RuntimeError, match="did not save step 2"):
        checkpoints.save(at(state, 2), {"next_index": 3})
    checkpoints.close()


def test_a_model_is_read_without_its_optimizer(tmp_path, built, state):
    record = {
        "experiment": "pretrain",
        "recipe": "tiny",
        "config": {"model": workdir.to_json(lm.MODEL)},
        "started": "now",
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    fill(tmp_path, state, [1.0, 2.0]).close()
    config, params = checkpoint.load_params(tmp_path)
    assert config == lm.MODEL
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    shardings = jax.tree.map(lambda struct: struct.sharding, built.state.params)
    _, split = checkpoint.load_params(tmp_path, step=1, shardings=shardings)
    assert split["embedding"].sharding == built.state.params["embedding"].sharding
    with pytest.raises(InputError, match=r"lacks the checkpoint of step 7; it has \[1, 2\]"):
        checkpoint.load_params(tmp_path, step=7)
    damage(tmp_path, 2)
    with pytest.raises(InputError, match="checkpoints/2 cannot be read"):
        checkpoint.load_params(tmp_path)
    with pytest.raises(InputError, match="config.json is missing"):
        checkpoint.load_params(tmp_path / "elsewhere")
