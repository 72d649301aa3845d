"""Peak memory of `hf.load` over the bytes its host holds; prints JSON.

    python -m benchmarks.load_memory

Writes a random checkpoint (Qwen2-0.5B's shape: 1.0 GB in bfloat16, several files) and loads it in fresh processes: onto
one device, onto 8 devices, in another dtype, and as two hosts that each hold half. The peak is the kernel's count of
resident pages (VmHWM), mapped file pages included; what python, jax and its idle devices took before is subtracted in
`ratio` and left in `ratio_with_runtime`.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import tyro

LIMIT = 1.3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        name: the shape, by its name in the registry.
        folder: where the checkpoint is written; a temporary one if not given.
        shard_bytes: largest file of the checkpoint.
    """

    name: str = "qwen2-0.5b"
    folder: pathlib.Path | None = None
    shard_bytes: int = 300_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to load: devices of each host, hosts, dtype wanted."""

    devices: int = 1
    hosts: int = 1
    dtype: str | None = None


CASES = {
    "one device": Case(),
    "8 devices": Case(devices=8),
    "8 devices, bfloat16 to float32": Case(devices=8, dtype="float32"),
    "2 hosts of 4 devices": Case(devices=4, hosts=2),
}


def write(folder: pathlib.Path, options: Options) -> None:
    """Writes random weights of the shape, one tensor in memory at a time."""
    import ml_dtypes

    from qwen_jax import config
    from qwen_jax.hf import layouts, saving

    shape, draw = config.get(options.name), np.random.default_rng(0)
    sizes = layouts.sizes(shape)

    def fetch(entry, layer):
        return draw.random([sizes[letter] for letter in entry.ours], np.float32).astype(ml_dtypes.bfloat16)

    saving.write(folder, shape, "bfloat16", fetch, options.shard_bytes)


def measure(folder: str, case: Case, host: int, address: str) -> dict:
    """Loads in this process; returns bytes and seconds."""
    import jax

    from qwen_jax import hf, sharding

    if case.hosts > 1:
        jax.distributed.initialize(address, case.hosts, host)
    mesh = sharding.make_mesh() if len(jax.devices()) > 1 else None
    before, start = _resident("VmRSS"), time.perf_counter()
    _, params = hf.load(folder, dtype=case.dtype, mesh=mesh)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, _resident("VmHWM")
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    return {
        "bytes_held": held,
        "peak_bytes": peak - before,
        "runtime_bytes": before,
        "ratio": round((peak - before) / held, 3),
        "ratio_with_runtime": round(peak / held, 3),
        "seconds": round(seconds, 2),
    }


def _resident(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _in_fresh_processes(folder: pathlib.Path, case: Case) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={case.devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def one(host: int) -> dict:
        arguments = json.dumps([str(folder), dataclasses.asdict(case), host, address])
        command = [sys.executable, "-m", "benchmarks.load_memory", "--host", arguments]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(case.hosts) as pool:
        return list(pool.map(one, range(case.hosts)))


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or pathlib.Path(scratch)) / "checkpoint"
        write(folder, options)
        cases = {name: _in_fresh_processes(folder, case) for name, case in CASES.items()}
    worst = max(host["ratio"] for hosts in cases.values() for host in hosts)
    print(json.dumps({"model": options.name, "worst_ratio": worst, "limit": LIMIT, "hosts": cases}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        path, fields, number, where = json.loads(sys.argv[2])
        print(json.dumps(measure(path, Case(**fields), number, where)))
    else:
        main(tyro.cli(Options))
