"""Two processes, as two hosts: each reads its own part only, and together they write what one would."""

import json

from tests import hosts
from tests.conftest import tiny
from tests.hf import made_up

HOST = """
import json
from qwen_jax import hf, sharding
from qwen_jax.hf import files

read, original = [0], files.Tensor.read
def counted(tensor, slices):
    part = original(tensor, slices)
    read[0] += part.nbytes
    return part
files.Tensor.read = counted

folder, target = words
mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
config, params = hf.load(folder, mesh=mesh)
hf.save(target, config, params, shard_bytes=20_000)
print(json.dumps({"read": read[0], "saved": len(hf.load(target)[1])}))
"""


def test_two_hosts(tmp_path):
    config = tiny(tie_word_embeddings=False)
    folder, target = made_up.checkpoint(tmp_path / "in", config), tmp_path / "out"
    told = hosts.run(HOST, folder, target, count=2, devices=4)
    found = [json.loads(out.splitlines()[-1]) for out in told]
    before, after = made_up.held(folder), made_up.held(target)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    split = sum(x.nbytes for name, x in before.items() if x.ndim == 2)  # biases and norms are on every host
    whole = sum(x.nbytes for x in before.values()) - split
    assert [host["read"] for host in found] == [split // 2 + whole] * 2
