"""Model-FLOPs utilisation: what the model needs, over what the devices could do in the same time."""

import time

import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig

# Peak bfloat16 FLOP/s of one device, from the vendors' data sheets; the key is a part of jax's device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def train_flops_per_token(config: QwenConfig, length: int, *, frozen: bool = False) -> float:
    """Returns the FLOPs that one token costs in a training step (forward + backward, nothing recomputed).

    6 per parameter of every matrix product (the embedding look-up is none, the head is one) plus causal attention:
    12 * layers * heads * head_dim * length / 2 (Chowdhery et al., arXiv:2204.02311, appendix B, halved for causality).
    4 per parameter where they are frozen: no gradient of theirs (the adapters beside them are not counted).
    """
    matmul = config.param_counts()["active_non_embedding"] + config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2
    return (4.0 if frozen else 6.0) * matmul + 12.0 * attention


def peak_flops(mesh: jax.sharding.Mesh) -> tuple[float, str]:
    """Returns the peak FLOP/s of all devices of the mesh, and where the figure comes from.

    Devices without a published figure are measured: the best of a few matrix products. Those of a CPU are virtual and
    share one machine, which is measured once, in float32; of others one is measured, in bfloat16, for all of them.
    """
    devices = mesh.devices.flatten()
    first = devices[0]
    for kind, peak in PEAK_FLOPS.items():
        if kind in first.device_kind:
            return peak * len(devices), f"{len(devices)} x {kind}, published bfloat16 peak"
    if first.platform == "cpu":
        return _measured(jnp.float32, 1536), "measured here: a float32 matrix product on all cores"
    source = f"{len(devices)} x {first.device_kind}, measured here: a bfloat16 matrix product on one"
    return _measured(jnp.bfloat16, 8192) * len(devices), source


def _measured(dtype, size: int, runs: int = 4) -> float:
    """Returns the FLOP/s of a product of two square matrices on this process's first device."""
    product = jax.jit(jnp.dot)
    x = jnp.ones((size, size), dtype)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
