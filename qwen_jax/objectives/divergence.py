"""How far a policy has moved from another one, estimated on tokens that were sampled.

With d = log other(token) - log policy(token) and tokens sampled from the policy, all three have the expectation
KL(policy, other) for small d (Schulman, "Approximating KL divergence", 2020):

k1  -d                unbiased, may be negative at a token, noisy
k2  d^2 / 2           biased, of small variance; its gradient is an unbiased gradient of the divergence
k3  exp(d) - d - 1    unbiased and never negative; the one of GRPO (arXiv:2402.03300, equation 4)
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError

Estimator = Literal["k1", "k2", "k3"]


def per_token(log_probs: jax.Array, other_log_probs: jax.Array, *, estimator: Estimator = "k3") -> jax.Array:
    """Returns the estimate at each token, float32 of the inputs' shape; nats.

    Args:
      log_probs: of sampled tokens under the policy, any shape.
      other_log_probs: of the same tokens under the other model.
      estimator: as above.

    Raises:
      InputError: on an unknown estimator.
    """
    d = other_log_probs.astype(jnp.float32) - log_probs.astype(jnp.float32)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return jnp.square(d) / 2
    if estimator == "k3":
        return jnp.expm1(d) - d
    raise InputError(f"the estimator {estimator!r} is unknown; expected one of {', '.join(get_args(Estimator))}")


def adapted(kl_coef: jax.Array, kl: jax.Array, *, target: float, horizon: float, answers: int) -> jax.Array:
    """Returns the weight of the divergence for the next rollout, steered to a target (arXiv:1909.08593, section 2.2).

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon)

    Args:
      kl_coef: scalar, of this rollout.
      kl: scalar, nats an answer, measured on it.
      target: what kl should be.
      horizon: answers in which the weight may change by a fifth of itself.
      answers: of the rollout.
    """
    return kl_coef * (1.0 + jnp.clip(kl / target - 1.0, -0.2, 0.2) * answers / horizon)
