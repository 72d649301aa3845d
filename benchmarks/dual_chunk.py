"""Dual chunk attention against plain blockwise attention: time of forward and backward, and memory by length.

    python benchmarks/dual_chunk.py [--runs 7] [--time 4096 8192] [--memory 4096 8192 16384 32768 65536]

Float32, on whatever this process runs on; 8 query and 2 kv heads of 64; chunks of 1024, 128 of them local, so that all
three kinds of keys occur at every length. Prints one JSON object per length. Time: of interleaved runs the minimum and
median of seconds, and of CPU seconds of the process, which a busy machine changes less; from unrotated queries to
their gradients, so that the three rotations are counted; their ratios.
Memory: temporary bytes of the compiled program, and their growth since the length before.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from qwen_jax.long_context import DualChunk, V1Lengths, Yarn
from qwen_jax.ops.attention import attention
from qwen_jax.ops.rope_scaling import rotation

N, K, H = 8, 2, 64
CHUNKS = {"plain": DualChunk(), "dual chunk": DualChunk(1024, local_size=128)}


def program(chunks: DualChunk, length: int):
    """Returns the compiled forward and backward of one row."""

    def run(q, k, v, d_out):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        marks = dict(q_positions_BT=positions, kv_positions_BS=positions)
        marks |= dict(q_segment_ids_BT=jnp.ones_like(positions), kv_segment_ids_BS=jnp.ones_like(positions))
        off = dict(yarn=Yarn(), v1=V1Lengths())
        turn = rotation(positions, positions + 1, head_dim=H, theta=1e6, chunks=chunks, **off)

        def attend(q, k, v):
            rotated = turn.queries(q), turn.keys(k)
            return attention(*rotated, v, **marks, backend="blockwise", stride=chunks.stride)[0]

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    shapes = [jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32) for heads in (N, K, K, N)]
    return jax.jit(run).lower(*shapes).compile()


def times(length: int, runs: int) -> dict:
    """Returns seconds and their ratios; the two take turns, so that a busy machine slows both."""
    keys = jax.random.split(jax.random.key(0), 4)
    arguments = [jax.random.normal(key, (1, length, n, H)) for key, n in zip(keys, (N, K, K, N), strict=True)]
    programs = {name: program(chunks, length) for name, chunks in CHUNKS.items()}
    clocks = {"seconds": time.perf_counter, "CPU seconds": time.process_time}
    taken = {clock: {name: [] for name in CHUNKS} for clock in clocks}
    for _ in range(runs + 1):
        for name, run in programs.items():
            starts = {clock: read() for clock, read in clocks.items()}
            jax.block_until_ready(run(*arguments))
            for clock, read in clocks.items():
                taken[clock][name].append(read() - starts[clock])
    figures = {"length": length, "platform": jax.default_backend()}
    for clock, of_programs in taken.items():
        for how in (min, statistics.median):
            found = {name: how(values[1:]) for name, values in of_programs.items()}  # the first is the warm-up
            ratio = round(found["dual chunk"] / found["plain"], 3)
            figures[f"{clock}, {how.__name__}"] = {x: round(y, 3) for x, y in found.items()} | {"ratio": ratio}
    return figures


def memory(lengths: list[int]):
    """Yields temporary bytes of each length, and how often those of the length before."""
    before = None
    for length in lengths:
        now = {name: program(chunks, length).memory_analysis().temp_size_in_bytes for name, chunks in CHUNKS.items()}
        yield {"length": length, "temporary MB": {name: round(x / 1e6, 1) for name, x in now.items()}} | (
            {"growth": {name: round(now[name] / before[name], 3) for name in CHUNKS}} if before else {}
        )
        before = now


def main():
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--time", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--memory", type=int, nargs="*", default=[2**n for n in range(12, 17)])
    flags = parser.parse_args()
    for figures in memory(flags.memory):
        print(json.dumps(figures))
    for length in flags.time:
        print(json.dumps(times(length, flags.runs)), flush=True)


if __name__ == "__main__":
    main()
