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

from qwen_jax.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24


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


def kill_after_a_checkpoint(folder):
    """kill -9 as soon as a checkpoint is whole, which is some steps after it was begun."""
    process = start(folder)
    while not [path for path in folder.glob("checkpoints/*") if path.name.isdigit()]:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_killed_run_ends_where_one_left_alone_ends(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(alone)
    kill_after_a_checkpoint(killed)
    resumed = re.search(rf"resuming at step (\d+) from {killed / 'checkpoints'}", finish(killed))
    assert 4 <= int(resumed[1]) < STEPS

    _, expected = checkpoint.load_params(alone)
    _, found = checkpoint.load_params(killed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    losses = lambda folder: [(row["step"], row["loss"]) for row in metrics.read(folder) if "loss" in row]
    assert losses(killed) == losses(alone)
    assert [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))

    before = {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")}
    assert f"already at step {STEPS} of {STEPS}" in finish(alone)
    assert {path: path.stat().st_mtime_ns for path in (alone / "checkpoints").rglob("*")} == before
