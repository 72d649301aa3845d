"""Two processes, as two hosts: each reads its own part only, and together they write what one would."""

import json
import pathlib
import socket
import subprocess
import sys

from tests.conftest import tiny
from tests.hf import made_up

HOST = """
import json, sys
import jax
address, number, folder, target = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, int(number))
from qwen_jax import hf, sharding
from qwen_jax.hf import files

read, original = [0], files.Tensor.read
def counted(tensor, slices):
    part = original(tensor, slices)
    read[0] += part.nbytes
    return part
files.Tensor.read = counted

mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
config, params = hf.load(folder, mesh=mesh)
hf.save(target, config, params, shard_bytes=20_000)
print(json.dumps({"read": read[0], "saved": len(hf.load(target)[1])}))
"""


def test_two_hosts(tmp_path):
    config = tiny(tie_word_embeddings=False)
    folder, target = made_up.checkpoint(tmp_path / "in", config), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(number), str(folder), str(target)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for number in range(2)
    ]  # fmt: skip
    told = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    found = [json.loads(out.splitlines()[-1]) for out, _ in told]
    before, after = made_up.held(folder), made_up.held(target)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    split = sum(x.nbytes for name, x in before.items() if x.ndim == 2)  # biases and norms are on every host
    whole = sum(x.nbytes for x in before.values()) - split
    assert [host["read"] for host in found] == [split // 2 + whole] * 2
