"""The only places a parameter is declared: `declare` and the two layers made with it.

Each parameter is born with the logical names of its axes, which `sharding.Rules` maps to the mesh.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import QwenConfig
from qwen_jax.ops import lora, quantisation
from qwen_jax.ops.dropout import Dropout, drop_adapter
from qwen_jax.ops.norm import rms_norm
from qwen_jax.ops.products import product
from qwen_jax.sharding import Layout


def declare(module: nn.Module, name: str, init, shape, axes, config: QwenConfig) -> jax.Array:
    """Declares one parameter of `module` with its logical axes, stored in config.param_dtype."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(config.param_dtype))


class Linear(nn.Module):
    """A matrix product written as an einsum, with an optional bias on the output axes and an optional adapter.

    Where the parameters were joined with LoRA adapters (`ops.lora.join`), x·A·B is added to the product: the kernel
    itself is not touched, and where only the adapters are differentiated it has no gradient. Codes and scales in the
    place of the kernel (`ops.quantisation`) are taken as it.

    Attributes:
      spec: einsum of input and kernel, "BTD,DNH->BTNH"; the capital letters are the shapes' letters.
      shape: of the kernel.
      axes: logical name of each kernel axis.
      config: dtypes and the standard deviation of the initial kernel.
      layout: mesh and rules.
      bias_axes: how many trailing kernel axes a bias has; 0 for none.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    config: QwenConfig
    layout: Layout
    bias_axes: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        init = nn.initializers.normal(self.config.initializer_range)
        x = x.astype(dtype)
        if self.has_variable("params", "codes"):
            stored = [self.get_variable("params", name) for name in ("codes", "scales")]
            kernel = quantisation.dequantise(*stored, dtype)  # read only by DoRA
            y = quantisation.product(self.spec, x, *stored)
        else:
            kernel = declare(self, "kernel", init, self.shape, self.axes, self.config).astype(dtype)
            y = product(self.spec, x, kernel, joined=self.layout.one_cpu)
        adapter = {
            name: self.get_variable("params", name) for name in lora.ADAPTER if self.has_variable("params", name)
        }
        if adapter:
            y = lora.adapted(self.spec, y, drop_adapter(x, dropout, self.name), kernel, adapter)
        if self.bias_axes:
            shape, axes = self.shape[-self.bias_axes :], self.axes[-self.bias_axes :]
            bias = declare(self, "bias", nn.initializers.zeros, shape, axes, self.config)
            y += bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` over the last axis, of this size, with its scale."""

    size: int
    config: QwenConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", nn.initializers.ones, (self.size,), ("norm",), self.config)
        return rms_norm(x, scale, eps=self.config.rms_norm_eps)
