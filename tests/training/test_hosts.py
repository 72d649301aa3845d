"""Two processes, as two hosts, train one run: the same losses as one process, and one writer of the run's folder."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from qwen_jax.sharding import MeshConfig
from qwen_jax.training import metrics

# Hosts that hold different rows, and hosts that hold different parts of the same rows.
MESHES = {"fsdp4": MeshConfig(fsdp=4), "context2-tensor2": MeshConfig(context=2, tensor=2)}

HOST = """
import dataclasses, sys
import jax
address, number, count, devices, folder = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
jax.config.update("jax_disable_most_optimizations", True)
if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(number))
from experiments import pretrain
from tests.training.test_hosts import MESHES

for name, mesh in MESHES.items():
    smoke = pretrain.smoke()
    pretrain.run(dataclasses.replace(smoke, mesh=mesh), f"{folder}/{name}", "smoke")
"""


def train(folder, count):
    """Runs HOST in `count` processes with four devices between them; returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(number), str(count), str(4 // count), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for number in range(count)
    ]  # fmt: skip
    told = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0] * count, told
    return [out for out, _ in told]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    train(alone, 1)
    return alone, together, train(together, 2)


@pytest.mark.parametrize("name", MESHES)
def test_two_hosts_train_as_one(runs, name):
    alone, together, _ = runs
    losses = lambda folder: [
        (row["step"], row.get("loss"), row.get("validation/loss")) for row in metrics.read(folder / name)
    ]
    expected, found = losses(alone), losses(together)
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
