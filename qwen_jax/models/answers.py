"""What a model makes of answers that stand side by side in rows: the score of each, or its log-probability.

Shapes: B rows, T tokens, A answers that a row has room for.
"""

import jax
import jax.numpy as jnp

from qwen_jax.batches import PreferenceBatch
from qwen_jax.config import QwenConfig
from qwen_jax.models import functional
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout


def scores(
    config: QwenConfig, params: dict, batch: PreferenceBatch, *, layout: Layout, dropout: Dropout | None = None
) -> jax.Array:
    """Returns a reward model's score of each answer, [B, A] float32; of what is no answer, any number."""
    scores_BT = functional.scores(
        config, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, layout=layout,
        dropout=dropout,
    )  # fmt: skip
    return jnp.take_along_axis(scores_BT, batch.ends, axis=1)


def log_probs(
    config: QwenConfig, params: dict, batch: PreferenceBatch, *, layout: Layout, dropout: Dropout | None = None
) -> jax.Array:
    """Returns the log-probability of each answer, [B, A] float32; 0 where there is none."""
    log_probs_BT = functional.log_probs(
        config, params, batch.tokens, batch.targets, positions=batch.positions, segment_ids=batch.segment_ids,
        layout=layout, dropout=dropout,
    )  # fmt: skip
    return sums(log_probs_BT * batch.loss_mask, batch)


def sums(x_BT: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """Returns the sum of x over the tokens of each answer and its prompt, [B, A]."""
    A = batch.groups.shape[1]
    own_BTA = (batch.segment_ids[:, :, None] == 1 + jnp.arange(A)[None, None]).astype(x_BT.dtype)
    return jnp.einsum("BT,BTA->BA", x_BT, own_BTA)
