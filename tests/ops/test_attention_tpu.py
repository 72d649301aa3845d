"""The TPU kernels: interpreted against blockwise attention, and compiled ahead of time for real topologies."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen_jax.long_context import DualChunk
from qwen_jax.ops import blocks, blockwise
from qwen_jax.ops.kernels import flash_tpu, walk
from tests.ops import test_attention as cases
from tests.ops import test_dual_chunk as dual_chunks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks at short lengths: 128 positions of two heads, 128 keys."""
    monkeypatch.setattr(flash_tpu, "ROWS", 256)
    monkeypatch.setattr(flash_tpu, "BLOCK_K", 128)


def run(kernels, spec, q, k, v, d_out, d_logsumexp, marks):
    """Returns both outputs and the gradients of q, k and v."""
    outputs = kernels.forward(q, k, v, marks, spec)
    return *outputs, *kernels.backward(q, k, v, *outputs, d_out, d_logsumexp, marks, spec)


class Interpreted:
    forward = staticmethod(functools.partial(flash_tpu.forward, interpret=True))
    backward = staticmethod(functools.partial(flash_tpu.backward, interpret=True))


@pytest.mark.parametrize("shape, causal", [((2, 200, 300, 4, 2, 8), True), ((1, 130, 130, 3, 1, 16), False)])
def test_kernels_equal_blockwise_with_all_gradients(shape, causal):
    spec = blocks.Spec(shape[-1] ** -0.5, causal, 64, 64)
    interpreted, expected = (jax.jit(functools.partial(run, kernels, spec)) for kernels in (Interpreted, blockwise))
    for kind in ("packed", "cache", "random"):
        marks = blocks.Marks(*cases.marks(1, kind, *shape[:3]))
        inputs = *cases.arrays(0, *shape), marks
        cases.assert_close(interpreted(*inputs), expected(*inputs))


CHUNKED = {  # chunks, (B, T, S, N, K, H), marks: blocks of 128 that divide the stride and that do not; four chunks
    "aligned": (DualChunk(160, 32), (1, 512, 512, 4, 2, 8), ("ordinary", "packed")),
    "cut": (DualChunk(100, 30, clamp="paper"), (2, 200, 330, 3, 1, 8), ("cache", "random")),
}


@pytest.mark.parametrize("case", CHUNKED)
def test_kernels_with_dual_chunks_equal_the_reference_with_all_gradients(case):
    chunks, shape, kinds = CHUNKED[case]
    spec = blocks.Spec(shape[-1] ** -0.5, True, 64, 64, chunks.stride)
    interpreted = jax.jit(functools.partial(run, Interpreted, spec))
    reference = cases.with_gradients(functools.partial(cases.reference, stride=chunks.stride))
    for kind in kinds:
        inputs, seen_by = dual_chunks.rotated(chunks, kind, shape)
        cases.assert_close(interpreted(*inputs, blocks.Marks(*seen_by)), reference(*inputs, *seen_by))


@functools.partial(jax.jit, static_argnums=1)
def steps(marks, spec):
    """Every step of the grid over query blocks, and of the one over key blocks."""
    grids = []
    for of_outer in flash_tpu._tile(marks, spec, G=1)[1:]:
        walked, blocks = walk.make(*of_outer, every_kind=False), of_outer[0].shape[2]
        twos, longest = walk.grid(walked)
        two, step = np.mgrid[:twos, : 2 * blocks].reshape(2, -1)
        places = jax.vmap(functools.partial(walk.locate, walked, 0))(two, step)
        grids.append((places, twos * longest, step < longest))
    return grids


@pytest.mark.parametrize("chunks, count", [(DualChunk(), 8), (DualChunk(320, 64), 8), (DualChunk(320, 64), 7)])
def test_a_causal_grid_has_no_empty_steps(chunks, count):
    """Each pair of blocks is a step, its kind of query the one that its chunks ask for; nothing else is."""
    positions = np.arange(128 * count)[None]
    marks = blocks.Marks(positions, positions, *(np.ones_like(positions),) * 2)
    chunk = lambda block: block * 128 // (chunks.stride or positions.size)
    expected = sorted((i, j, min(chunk(i) - chunk(j), 2)) for i in range(count) for j in range(i + 1))
    over_queries, over_keys = steps(marks, blocks.Spec(1.0, True, 128, 128, chunks.stride))
    for (places, size, taken), (i, j) in ((over_queries, ("outer", "inner")), (over_keys, ("inner", "outer"))):
        found = np.stack([getattr(places, of) for of in (i, j, "kind")], axis=1)[(places.masked | places.clear) & taken]
        assert sorted(map(tuple, found.tolist())) == expected
        assert int((places.clear & taken).sum()) == count * (count - 1) // 2  # only the diagonal needs a mask
        assert size - len(found) == count % 2 * (count + 1) // 2  # the block in the middle has no partner
        for ends in (places.opens, places.closes):
            assert sorted(places.outer[ends & taken].tolist()) == list(range(count))


def test_kernels_do_not_touch_blocks_that_nobody_sees():
    B, T, S = 2, 128, 384
    q, k, v, *cotangents = cases.arrays(2, B, T, S, 2, 1, 8)
    index = np.arange(S)[None].repeat(B, 0)
    seen = (index >= 128) & (index < 256)  # earlier keys are of another document, later ones are later
    positions, segments = index, 1 + (index >= 128)
    marks = blocks.Marks(positions[:, 128:256], positions, segments[:, 128:256], segments)
    spec = blocks.Spec(1.0, True, T, 128)
    interpreted = jax.jit(functools.partial(run, Interpreted, spec))
    dirty = interpreted(q, *cases.poisoned(k, v, ~seen), *cotangents, marks)
    cases.assert_close(dirty, interpreted(q, k, v, *cotangents, marks))
    assert all(np.all(np.isfinite(x)) for x in dirty)


AHEAD_OF_TIME = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from qwen_jax import sharding
from qwen_jax.ops.attention import attention

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, context=2, tensor=len(devices) // 4), devices)
rules = sharding.Rules()
rows, keys = rules.spec(("batch", "length", "heads", "head_dim")), rules.spec(("batch", None, "kv_heads", "head_dim"))
row_marks, key_marks = PartitionSpec(*rows[:2]), PartitionSpec(*keys[:2])
specs = rows, keys, keys, row_marks, key_marks, row_marks, key_marks

stride = int(sys.argv[2]) or None
queries = rows if stride is None else PartitionSpec(None, *rows)
specs = queries, *specs[1:]

def local(q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return attention(q, k, v, q_positions_BT=q_positions, kv_positions_BS=kv_positions,
                     q_segment_ids_BT=q_segment_ids, kv_segment_ids_BS=kv_segment_ids, stride=stride)

def loss(q, k, v, *marks):
    attend = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, PartitionSpec(*rows[:3])))
    out, logsumexp = attend(q, k, v, *marks)
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(logsumexp)

shapes = [(4, 1024, heads, 128) for heads in (28, 4, 4)]
shapes[0] = shapes[0] if stride is None else (3, *shapes[0])
inputs = [(shape, jnp.bfloat16) for shape in shapes] + [((4, 1024), jnp.int32)] * 4
inputs = [jax.ShapeDtypeStruct(shape, t, sharding=NamedSharding(mesh, spec))
          for (shape, t), spec in zip(inputs, specs, strict=True)]
text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile().as_text()
print(json.dumps({"kernels": text.count('custom_call_target="tpu_custom_call"'), "loops": text.count(" while(")}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
@pytest.mark.parametrize("topology, stride", [("v5p:2x2x1", 0), ("v5e:2x2", 256), ("v5p:2x2x1", 256), ("v6e:2x2", 256)])
def test_auto_inside_shard_map_compiles_to_the_kernels_for_a_tpu(topology, stride):
    import libtpu

    environment = dict(os.environ, TPU_LIBRARY_PATH=libtpu.get_library_path(), TPU_SKIP_MDS_QUERY="1")
    environment |= dict(
        JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="true", XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="0"
    )
    command = [sys.executable, "-c", AHEAD_OF_TIME, topology, str(stride)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Forward, gradient of the queries, gradient of keys and values; no loop: blockwise is not what was compiled.
    assert json.loads(done.stdout.splitlines()[-1]) == {"kernels": 3, "loops": 0}
