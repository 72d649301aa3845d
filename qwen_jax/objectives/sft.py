"""Next-token loss over the tokens that are to be learned: pretraining and supervised fine-tuning."""

import jax

from qwen_jax.objectives import masked


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
    mean = -masked.mean(log_probs_BT, loss_mask_BT)
    return mean, {"nll": mean}
