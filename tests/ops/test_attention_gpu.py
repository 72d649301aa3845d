"""The GPU kernels: interpreted against the reference, and compiled ahead of time for an H100."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qwen_jax.long_context import DualChunk
from qwen_jax.ops import blocks
from qwen_jax.ops.kernels import flash_gpu
from tests.ops import test_attention as cases
from tests.ops import test_dual_chunk as dual_chunks

H100 = Path(__file__).parents[2] / "launch" / "h100.txtpb"
CASES = {  # chunks, (B, T, S, N, K, H), causal, marks
    "plain": (DualChunk(), (2, 100, 140, 4, 2, 16), True, ("packed", "random")),
    "not causal": (DualChunk(), (1, 70, 70, 3, 1, 16), False, ("packed",)),
    "dual chunks": (DualChunk(100, 30, clamp="paper"), (1, 200, 256, 2, 1, 16), True, ("packed", "cache")),
}


def run(spec, q, k, v, d_out, d_logsumexp, marks):
    """Returns both outputs and the gradients of q, k and v."""
    outputs = flash_gpu.forward(q, k, v, marks, spec, interpret=True)
    return *outputs, *flash_gpu.backward(q, k, v, *outputs, d_out, d_logsumexp, marks, spec, interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_with_all_gradients(case):
    chunks, shape, causal, kinds = CASES[case]
    interpreted = jax.jit(functools.partial(run, blocks.Spec(shape[-1] ** -0.5, causal, 64, 64, chunks.stride)))
    reference = cases.with_gradients(functools.partial(cases.reference, causal=causal, stride=chunks.stride))
    for kind in kinds:
        inputs, seen_by = dual_chunks.rotated(chunks, kind, shape)
        cases.assert_close(interpreted(*inputs, blocks.Marks(*seen_by)), reference(*inputs, *seen_by))


AHEAD_OF_TIME = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from qwen_jax import sharding
from qwen_jax.ops.attention import attention

where = dict(topology_name="h100", target_config=open(sys.argv[1]).read(), topology="1x1x8")
mesh = sharding.make_mesh(sharding.MeshConfig(), topologies.get_topology_desc(platform="cuda", **where).devices)
rows = PartitionSpec("fsdp")

def program(head_dim, stride):
    queries = rows if stride is None else PartitionSpec(None, "fsdp")

    def local(q, k, v, positions, segment_ids):
        marks = dict(q_positions_BT=positions, kv_positions_BS=positions)
        marks |= dict(q_segment_ids_BT=segment_ids, kv_segment_ids_BS=segment_ids)
        return attention(q, k, v, **marks, stride=stride)

    def loss(q, k, v, *marks):
        specs = (queries, rows, rows, rows, rows)
        out, logsumexp = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows))(q, k, v, *marks)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(logsumexp)

    shapes = [(8, 1024, heads, head_dim) for heads in (28, 4, 4)]
    shapes[0] = shapes[0] if stride is None else (3, *shapes[0])
    inputs = [(shape, jnp.bfloat16) for shape in shapes] + [((8, 1024), jnp.int32)] * 2
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
              for (shape, dtype), spec in zip(inputs, (queries, rows, rows, rows, rows), strict=True)]
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    return text.count('"__gpu$xla.gpu.triton"'), text.count(" while(") > 0

print(json.dumps([program(128, None), program(128, 256), program(48, None)]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the extra cuda, a compiler for GPUs, is not installed",
)
def test_auto_inside_shard_map_compiles_to_the_kernels_for_an_h100():
    environment = dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cpu")
    environment |= dict(XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(H100)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Three kernels and no loop; heads of 48 are none for Triton, and blockwise's loops are compiled.
    assert json.loads(done.stdout.splitlines()[-1]) == [[3, False], [3, False], [0, True]]
