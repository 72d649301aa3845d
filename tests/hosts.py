"""Several processes on this machine, as several hosts of one run."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# XLA's own setting for programs that are compiled more than they are run: a quarter of the default's compile time.
FAST_COMPILE = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
PREAMBLE = """
import sys
import jax
address, number, count, devices, *words = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(number))
"""


def run(code: str, *words, count: int, devices: int) -> list[str]:
    """Runs code, which finds its `words`, in `count` processes that share `devices`; returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, address, str(number), str(count), str(devices // count)]
            + [str(word) for word in words],
            env={**os.environ, "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for number in range(count)
    ]  # fmt: skip
    told = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0] * count, told
    return [out for out, _ in told]
