"""A sequence split over devices: causal work of each, what each holds, and what they send each other.

    python benchmarks/context.py [--length 16384] [--parts 2 4 8]

On 8 virtual CPU devices; the attention of one layer, float32, 8 query and 2 kv heads of 64, one row; dual chunks of
1024, 128 of them local. One JSON object for each number of parts and kind of attention:
  block pairs: pairs of blocks that the device with most of them computes over their mean, and the same if each device
    kept the queries it has (`models.attend` trades halves of them).
  MB of a device: arguments, outputs and temporaries of the compiled forward and backward, and of it on one device.
  MB sent: output bytes of each kind of collective in that program, a device.
"""

import argparse
import collections
import functools
import json
import math
import os
import re

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from qwen_jax.models import attend
from qwen_jax.ops import blocks
from qwen_jax.sharding import Layout, MeshConfig, make_mesh

N, K, H, STRIDE, BLOCK = 8, 2, 64, 896, 128
COLLECTIVE = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-gather|reduce-scatter|collective-permute|all-reduce)\(")


def pairs(length: int, parts: int, stride: int | None, *, traded: bool) -> float:
    """Returns the most pairs of blocks that one of the devices computes, over the mean of all."""
    part, counts = length // parts, []
    positions = jnp.arange(length, dtype=jnp.int32)
    for device in range(parts):
        own = positions[device * part : (device + 1) * part]
        if traded:
            mirrored = positions[(parts - 1 - device) * part : (parts - device) * part]
            own = jnp.concatenate([own[: part - part // 2], mirrored[part - part // 2 :]])
        marks = blocks.Marks(own[None], positions[None], jnp.ones_like(own)[None], jnp.ones_like(positions)[None])
        spec = blocks.Spec(1.0, True, BLOCK, BLOCK, stride)
        counts.append(int(blocks.by_pairs(blocks.seen, *blocks.cut_both(marks, spec), spec).sum()))
    return max(counts) / (sum(counts) / parts)


def program(length: int, parts: int, stride: int | None):
    """Returns the compiled forward and backward of one row's attention."""
    layout = Layout(make_mesh(MeshConfig(fsdp=1, context=parts), jax.devices()[:parts]))

    def run(q, k, v, d_out):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        ones = jnp.ones_like(positions)
        seen_by = positions, positions, ones, ones
        how = dict(backend="blockwise", layout=layout, stride=stride)
        out, back = jax.vjp(functools.partial(attend.attend, marks=seen_by, **how), q, k, v)
        return out, back(d_out)

    kinds = () if stride is None else (3,)
    shapes = (*kinds, 1, length, N, H), (1, length, K, H), (1, length, K, H), (1, length, N, H)
    axes = ("batch", "length", None, None)
    where = [layout.sharding((*(None,) * (len(shape) - 4), *axes), shape) for shape in shapes]
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, where, strict=True)]
    return jax.jit(run, out_shardings=(where[3], tuple(where[:3]))).lower(*structs).compile()


def held(compiled) -> dict[str, float]:
    """Returns MB of what one device holds: arguments and outputs, and what is between them."""
    sizes = compiled.memory_analysis()
    ends = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return {"arguments and outputs": round(ends / 1e6, 1), "temporary": round(sizes.temp_size_in_bytes / 1e6, 1)}


def sent(text: str) -> dict[str, float]:
    """Returns MB of what each kind of collective in a compiled program puts out."""
    found = collections.Counter()
    for kind, shape, name in COLLECTIVE.findall(text):
        size = jnp.dtype({"f32": "float32", "s32": "int32", "pred": "bool"}[kind]).itemsize
        found[name] += size * math.prod(map(int, filter(None, shape.split(",")))) / 1e6
    return {name: round(size, 2) for name, size in found.items()}


def main():
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 4, 8])
    flags = parser.parse_args()
    for name, stride in (("plain", None), ("dual chunk", STRIDE)):
        alone = held(program(flags.length, 1, stride))
        for parts in flags.parts:
            compiled = program(flags.length, parts, stride)
            balance = {how: round(pairs(flags.length, parts, stride, traded=how == "traded"), 3)
                       for how in ("traded", "kept")}  # fmt: skip
            figures = {"length": flags.length, "attention": name, "parts": parts, "block pairs, most/mean": balance}
            figures |= {"MB of a device": held(compiled), "of one alone": alone, "MB sent": sent(compiled.as_text())}
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
