"""Next-token loss over the tokens that are to be learned: pretraining and supervised fine-tuning."""

import jax
import jax.numpy as jnp


def loss(log_probs_BT: jax.Array, loss_mask_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean negative log-likelihood, in nats per learned token.

    loss = - sum_bt mask_bt * log p(target_bt) / sum_bt mask_bt   (Qwen report, arXiv:2309.16609, section 3.1.2)

    Args:
      log_probs_BT: [B, T] float32 log-probability of each target.
      loss_mask_BT: [B, T] float32 weight of each target; 0 where nothing is learned.

    Returns:
      mean: scalar float32; 0 where the mask is all zero.
      metrics: {"nll": the same}, so that the likelihood stays visible when other losses are added.
    """
    mask_BT = loss_mask_BT.astype(jnp.float32)
    # A target that is masked may have any log-probability, infinite included: leave it out before multiplying.
    total = -jnp.sum(jnp.where(mask_BT > 0, log_probs_BT, 0.0) * mask_BT)
    weight = jnp.sum(mask_BT)
    mean = total / jnp.where(weight > 0, weight, 1.0)
    return mean, {"nll": mean}
