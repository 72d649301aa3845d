"""Two processes, as two hosts, train one run: the same losses as one process, and one writer of the run's folder."""

import dataclasses
import json

import jax
import pytest

from experiments import pretrain
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import metrics, samples
from qwen_jax.training.samples import SamplesConfig
from tests import hosts

# Hosts that hold different rows, and hosts that hold different parts of the same rows.
MESHES = {"fsdp4": MeshConfig(fsdp=4), "context2-tensor2": MeshConfig(context=2, tensor=2)}
SAMPLES = SamplesConfig(prompts=2, max_new_tokens=4)

TRAIN = """
import dataclasses
from experiments import pretrain
from tests.training.test_hosts import MESHES, SAMPLES

for name, mesh in MESHES.items():
    asked = SAMPLES if name == "fsdp4" else pretrain.smoke().samples
    pretrain.run(dataclasses.replace(pretrain.smoke(), mesh=mesh, samples=asked), f"{words[0]}/{name}", "smoke")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("alone") / "run", tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        pretrain.run(dataclasses.replace(pretrain.smoke(), samples=SAMPLES), alone, "smoke")
    return alone, together, hosts.run(TRAIN, together, count=2, devices=4)


@pytest.mark.parametrize("name", MESHES)
def test_two_hosts_train_as_one(runs, name):
    alone, together, _ = runs
    losses = lambda folder: [(row["step"], row.get("loss"), row.get("validation/loss")) for row in metrics.read(folder)]
    expected, found = losses(alone), losses(together / name)
    assert len(found) == len(expected) == 5
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_the_first_host_alone_writes_and_speaks(runs):
    _, together, (first, second) = runs
    assert "done: figures in" in first and "[pretrain]" not in second
    for name in MESHES:
        lines = (together / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 1, 2, 2]
        assert len(list((together / name).glob("events.out.tfevents.*"))) == 1
        assert (together / name / "report.md").exists()


def test_samples_of_two_hosts_are_those_of_one(runs):
    alone, together, _ = runs
    kept = samples.read(alone)
    assert list(kept) == [0, 2] and len(kept[2]) == 2 and samples.read(together / "fsdp4") == kept
    assert not (together / "context2-tensor2" / samples.FOLDER).exists()
