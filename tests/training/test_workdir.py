"""A run's folder belongs to one run."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import workdir
from qwen_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def prepare(folder, config=Config(), recipe="a"):  # noqa: B008
    return workdir.prepare(folder, config, experiment="sft", recipe=recipe)


def test_the_record_holds_the_resolved_config_and_what_it_ran_with(tmp_path):
    prepare(tmp_path / "new" / "run", Config(seed=3))
    record = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert record["config"]["seed"] == 3 and record["config"]["optimizer"]["b2"] == 0.95
    assert {"jax", "python", "orbax-checkpoint"} <= record["versions"].keys()
    assert {"argv", "git", "started", "recipe", "experiment"} <= record.keys()


def test_the_same_run_may_come_back_on_another_mesh(tmp_path):
    prepare(tmp_path)
    started = workdir.read(tmp_path)["started"]
    prepare(tmp_path, Config(mesh=MeshConfig(tensor=2)))
    assert workdir.read(tmp_path)["started"] == started
    assert workdir.read(tmp_path)["config"]["mesh"]["tensor"] == 2


def test_another_run_is_refused_by_the_field_that_differs(tmp_path):
    prepare(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    other = Config(optimizer=dataclasses.replace(OptimizerConfig(), peak_lr=1.0))
    with pytest.raises(
        InputError, match=r"holds optimizer.peak_lr = 0.0003, this run wants 1.0; use another --workdir"
    ):
        prepare(tmp_path, other)
    with pytest.raises(InputError, match="is of recipe 'a', not 'b'"):
        prepare(tmp_path, recipe="b")
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no config.json"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "qwen2"}'])
def test_a_config_that_is_not_a_runs_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is not the config of a run"):
        prepare(tmp_path)
