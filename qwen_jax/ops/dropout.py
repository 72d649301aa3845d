"""Dropout with explicit keys (Srivastava et al., 2014)."""

import dataclasses
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """What is dropped in one forward pass, and the key it is drawn with. Without dropout there is none: None.

    Attributes:
      key: of the pass; inside a stack, of the layer (all layers' in one array of [L] keys goes into the scan).
      rate: of the embeddings, and of what attention and MLP add to the residual stream.
      adapter_rate: of the input of LoRA adapters.
    """

    key: jax.Array
    rate: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    adapter_rate: float = dataclasses.field(default=0.0, metadata=dict(static=True))

    def split(self, count: int) -> "Dropout":
        """Returns the same with `count` keys, one a layer."""
        return dataclasses.replace(self, key=jax.random.split(self.key, count))


def drop(x: jax.Array, dropout: Dropout | None, place: str) -> jax.Array:
    """Drops entries of x at dropout.rate; `place` names where in the layer, so that no two places share draws."""
    return x if dropout is None else _drop(x, dropout.rate, dropout.key, place)


def drop_adapter(x: jax.Array, dropout: Dropout | None, place: str) -> jax.Array:
    """Drops entries of x at dropout.adapter_rate."""
    return x if dropout is None else _drop(x, dropout.adapter_rate, dropout.key, f"adapter {place}")


def _drop(x: jax.Array, rate: float, key: jax.Array, place: str) -> jax.Array:
    """Zeroes each entry with probability `rate` and divides the others by 1 - rate, so that the mean stays."""
    if not rate:
        return x
    key = jax.random.fold_in(key, zlib.crc32(place.encode()))
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros((), x.dtype))
