"""The next-token loss against plain numpy: its sign, its mean, and what the mask leaves out."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import objectives
from qwen_jax.batches import Loss


def test_it_is_the_weighted_mean_of_minus_log_p():
    log_probs = np.log(np.array([[0.5, 0.25, 0.1], [0.9, 0.2, 0.3]]))
    mask = np.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    total, weight = 0.0, 0.0
    for b in range(2):
        for t in range(3):
            total -= mask[b, t] * log_probs[b, t]
            weight += mask[b, t]
    mean, metrics = objectives.sft.loss(jnp.asarray(log_probs), jnp.asarray(mask))
    np.testing.assert_allclose(mean, total / weight, rtol=1e-6)
    assert metrics["nll"] == mean


def test_a_certain_model_has_no_loss_and_a_uniform_one_the_logarithm_of_its_choices():
    ones = jnp.ones((2, 3))
    assert objectives.sft.loss(jnp.zeros((2, 3)), ones)[0] == 0
    np.testing.assert_allclose(objectives.sft.loss(jnp.full((2, 3), -np.log(7.0)), ones)[0], np.log(7.0), rtol=1e-6)


def test_what_is_masked_may_be_infinite_and_has_no_gradient():
    log_probs, mask = jnp.array([[-1.0, -jnp.inf, -3.0]]), jnp.array([[1.0, 0.0, 1.0]])
    assert objectives.sft.loss(log_probs, mask)[0] == 2.0
    grad = jax.grad(lambda x: objectives.sft.loss(x, mask)[0])(log_probs)
    np.testing.assert_allclose(grad, [[-0.5, 0.0, -0.5]])  # a likelier target lowers the loss


def test_nothing_to_learn_is_zero_and_adds_nothing():
    mean, metrics = objectives.sft.loss(jnp.array([[-2.0]]), jnp.array([[0.0]]))
    loss = Loss.from_mean(mean, jnp.float32(0.0), metrics)
    assert (loss.total, loss.weight, loss.metrics["nll"]) == (0, 0, 0)
