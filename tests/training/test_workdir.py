"""A run's folder belongs to one run."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import workdir
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from tests.conftest import tiny


@dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    model: QwenConfig = tiny()
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    inner: Config


def begun(folder):
    (folder / "metrics.jsonl").touch()


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
    begun(tmp_path)
    started = workdir.read(tmp_path)["started"]
    prepare(tmp_path, Config(mesh=MeshConfig(tensor=2)))
    assert workdir.read(tmp_path)["started"] == started
    assert workdir.read(tmp_path)["config"]["mesh"]["tensor"] == 2


def test_how_a_run_is_computed_and_how_often_it_reports_may_change(tmp_path):
    stage = lambda **fields: Stage(Config(**fields))
    prepare(tmp_path, stage())
    begun(tmp_path)
    prepare(tmp_path, stage(mesh=MeshConfig(tensor=2), loop=LoopConfig(log_every=3), model=tiny(remat="full")))
    with pytest.raises(InputError, match=r"holds inner.loop.steps = 1000, this run wants 3"):
        prepare(tmp_path, stage(loop=LoopConfig(steps=3)))


def test_a_run_that_did_nothing_yet_gives_its_folder_up(tmp_path):
    """As after a typing mistake in a data file's name: the corrected command must not be refused."""
    prepare(tmp_path, Config(seed=1), recipe="b")
    prepare(tmp_path, Config(seed=2))
    assert workdir.read(tmp_path)["config"]["seed"] == 2


def test_a_workdir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file cannot be a run's folder: Not a directory; use another --workdir"):
        prepare(tmp_path / "file")
    with pytest.raises(InputError, match="run cannot be a run's folder: Not a directory"):
        prepare(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "x"


def test_another_run_is_refused_by_the_field_that_differs(tmp_path):
    prepare(tmp_path)
    begun(tmp_path)
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
