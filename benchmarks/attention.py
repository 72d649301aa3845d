"""Time of blockwise attention against the reference, forward and backward, float32, on whatever this process runs on.

    python benchmarks/attention.py [--runs 7]

Prints one JSON object per case: heads and widths of the CPU comparison configuration (8 query heads, 2 kv heads of 64),
medians of interleaved runs in milliseconds and their ratio, and the temporary memory of both compiled programs.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from qwen_jax.ops.attention import attention

N, K, H = 8, 2, 64
CASES = ((4, 512), (1, 2048))  # batch and length; the first is the comparison configuration
BACKENDS = ("blockwise", "reference")


def inputs(batch: int, length: int):
    """Returns q, k, v, the cotangent of the output, positions and segment ids of ordinary rows."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (N, K, K, N)
    arrays = [jax.random.normal(key, (batch, length, n, H)) for key, n in zip(keys, heads, strict=True)]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return *arrays, positions, jnp.ones_like(positions)


def program(backend: str, arguments):
    """Returns the compiled forward and backward."""

    def run(q, k, v, d_out, positions, segment_ids):
        def attend(q, k, v):
            marks = dict(q_positions_BT=positions, kv_positions_BS=positions)
            marks |= dict(q_segment_ids_BT=segment_ids, kv_segment_ids_BS=segment_ids)
            return attention(q, k, v, **marks, backend=backend)[0]

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    return jax.jit(run).lower(*arguments).compile()


def compare(batch: int, length: int, runs: int) -> dict:
    """Returns the figures of one case; the two programs take turns, so that a busy machine slows both."""
    arguments = inputs(batch, length)
    programs = {backend: program(backend, arguments) for backend in BACKENDS}
    seconds = {backend: [] for backend in BACKENDS}
    for _ in range(runs + 1):
        for backend, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[backend].append(time.perf_counter() - start)
    milliseconds = {backend: 1e3 * statistics.median(seconds[backend][1:]) for backend in BACKENDS}  # first: warm-up
    return {
        "batch": batch,
        "length": length,
        "platform": jax.default_backend(),
        "milliseconds": {backend: round(value, 1) for backend, value in milliseconds.items()},
        "blockwise/reference": round(milliseconds["blockwise"] / milliseconds["reference"], 3),
        "temporary MB": {b: round(p.memory_analysis().temp_size_in_bytes / 1e6, 1) for b, p in programs.items()},
    }


def main():
    """Prints the figures of all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for batch, length in CASES:
        print(json.dumps(compare(batch, length, runs)))


if __name__ == "__main__":
    main()
