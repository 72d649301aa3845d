"""The same quantities from our side, as numpy, gradients under the published names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import hf, models
from tests.hf import made_up
from tests.parity.batches import scored


def logits(config, params, tokens, segments) -> np.ndarray:
    return np.asarray(models.forward(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(segments)))


def loss_and_gradients(config, params, tokens, segments, folder) -> tuple[float, dict[str, np.ndarray]]:
    """`folder`: a new one, where the gradients are saved as if they were parameters, to give them their names."""
    value, gradients = _loss_and_gradients(config, params, *map(jnp.asarray, (tokens, segments, scored(segments))))
    hf.save(folder, config, gradients)
    return float(value), made_up.held(folder)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(config, params, tokens, segments, mask):
    def loss(params):
        found = models.sequence_log_probs(config, params, tokens, segment_ids=segments)
        return -jnp.where(mask, found, 0).sum() / mask.sum()

    return jax.value_and_grad(loss)(params)


def worst(found: np.ndarray, expected: np.ndarray, segments: np.ndarray) -> float:
    """Returns the largest difference of logits where there is a token."""
    real = segments > 0
    return float(np.abs(found[real] - expected[real]).max())


def worst_relative(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Returns over all tensors the largest difference relative to the tensor's largest entry.

    The gradient of an expert that no token chose is 0 on both sides: its difference is taken as it is.
    """
    assert found.keys() == expected.keys()
    size = {name: np.abs(x).max() or 1.0 for name, x in expected.items()}
    return max(float(np.abs(found[name] - expected[name]).max() / size[name]) for name in expected)
