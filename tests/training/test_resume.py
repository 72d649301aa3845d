"""A run that is really killed and started again ends where the run that was left alone ends, to the bit."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen_jax.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12

pytestmark = pytest.mark.xdist_group("resume")  # the runs are made once, for all tests here


def start(folder):
    command = [sys.executable, "-m", "tests.training.interrupted_run", str(folder), str(STEPS)]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder) -> str:
    process = start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_after_step(folder, step):
    """kill -9 as soon as the run has told of this step."""
    process = start(folder)
    for line in process.stdout:
        if f"step {step}/" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    alone, killed = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("killed")
    alone, killed = alone / "run", killed / "run"
    finish(alone)
    kill_after_step(killed, 6)  # two steps past the checkpoint of step 4: those must be trained again
    kill_after_step(killed, 10)
    return alone, killed, finish(killed)


def test_parameters_are_bit_identical(runs):
    alone, killed, _ = runs
    _, expected = checkpoint.load_params(alone)
    _, found = checkpoint.load_params(killed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_says_where_it_resumes(runs):
    _, killed, output = runs
    # Saves finish in the background: the one of step 8 may have been under way when the run was killed at step 10.
    assert re.search(rf"resuming at step [48] from {killed / 'checkpoints'}", output)


def test_figures_have_each_step_once_and_the_same_losses(runs):
    alone, killed, _ = runs
    losses = lambda folder: [(row["step"], row["loss"]) for row in metrics.read(folder) if "loss" in row]
    assert losses(killed) == losses(alone)
    assert [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))


def test_starting_a_finished_run_again_trains_nothing(runs):
    alone, _, _ = runs
    before = {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")}
    assert f"already at step {STEPS} of {STEPS}" in finish(alone)
    assert {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")} == before
