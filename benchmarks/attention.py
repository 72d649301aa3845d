"""Time of blockwise attention against the reference and torch, forward and backward, float32.

    python benchmarks/attention.py [--runs 7]

Prints one JSON object per case: heads and widths of the CPU comparison configuration (8 query heads, 2 kv heads of 64),
medians of interleaved runs in milliseconds and their ratios, and the temporary memory of our compiled programs. torch's
scaled_dot_product_attention takes part where torch is installed and this process runs on a CPU; its answer is checked
to be ours. It is given heads before places, the layout it likes; we are given places before heads, as models have them.
"""

import argparse
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

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


def torch_program(arguments):
    """Returns the same by torch, on its own copies of q, k, v and d_out; None where it cannot take part."""
    try:
        import torch
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    q, k, v, d_out = (torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arguments[:4])
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return out, torch.autograd.grad(out, inputs, d_out)

    return run


def agree(ours, theirs) -> None:
    """Stops if the two did not compute the same output and gradients."""
    for found, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, other.detach().transpose(1, 2).numpy(), atol=1e-4, rtol=1e-4)


def compare(batch: int, length: int, runs: int) -> dict:
    """Returns the figures of one case; the programs take turns, so that a busy machine slows all."""
    arguments = inputs(batch, length)
    programs = {backend: program(backend, arguments) for backend in BACKENDS}
    calls = {backend: lambda run=run: jax.block_until_ready(run(*arguments)) for backend, run in programs.items()}
    if (theirs := torch_program(arguments)) is not None:
        agree(calls["blockwise"](), theirs())
        calls["torch"] = theirs
    seconds = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    milliseconds = {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}  # first: warm-up
    return {
        "batch": batch,
        "length": length,
        "platform": jax.default_backend(),
        "milliseconds": {name: round(value, 1) for name, value in milliseconds.items()},
        **{
            f"blockwise/{peer}": round(milliseconds["blockwise"] / milliseconds[peer], 3)
            for peer in milliseconds
            if peer != "blockwise"
        },
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
