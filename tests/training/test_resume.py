"""A run that is really killed and started again ends where the run that was left alone ends, to the bit."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qwen_jax.training import checkpoint, metrics
from tests.hosts import FAST_COMPILE

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24


def start(folder, *wrapper):
    flags = f"--loop.steps {STEPS} --loop.log-every 1 --loop.eval-every 4 --loop.checkpoint-every 4 --microbatches 2"
    command = [
        *wrapper,
        sys.executable,
        "-m",
        "experiments.pretrain",
        "smoke",
        "--workdir",
        str(folder),
        *flags.split(),
    ]
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE}  # one device
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder) -> str:
    process = start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def stop_after_a_checkpoint(folder, how) -> int:
    """Sends the signal as soon as a checkpoint is whole, which is some steps after it was begun; returns the status."""
    process = start(folder)
    while not [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    finish(folder)
    return folder


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_stopped_run_ends_where_one_left_alone_ends(alone, tmp_path, how, status):
    killed = tmp_path / "killed"
    assert stop_after_a_checkpoint(killed, how) == status
    resumed = re.search(rf"resuming at step (\d+) from {killed / 'checkpoints'}", finish(killed))
    assert 4 <= int(resumed[1]) < STEPS

    _, expected = checkpoint.load_params(alone)
    _, found = checkpoint.load_params(killed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    losses = lambda folder: [(row["step"], row["loss"]) for row in metrics.read(folder) if "loss" in row]
    assert losses(killed) == losses(alone)
    assert [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))


def test_a_disk_that_fills_up_is_one_line_and_costs_no_checkpoint(tmp_path):
    stop_after_a_checkpoint(tmp_path / "run", signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    process = start(tmp_path / "run", "bash", "-c", 'ulimit -f 20; exec "$@"', "-")  # no file may grow over 20 kB
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    # tensorstore's threads may print beside it what became of the other files of the checkpoint that failed.
    (told,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert told.startswith("error: a checkpoint could not be written to ") and "File too large" in told
    assert (
        kept.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").glob("*")}.items()
    )
    checkpoint.load_params(tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(alone):
    before = {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")}
    assert f"already at step {STEPS} of {STEPS}" in finish(alone)
    assert {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")} == before
