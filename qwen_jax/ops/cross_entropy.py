"""Log-probabilities of given tokens without ever holding the logits of a whole vocabulary.

The vocabulary is walked in chunks: the forward pass keeps a running logsumexp, the backward pass forms each chunk's
logits again. Per chunk the gradient of the head is complete, so under fsdp it is reduced once, not once per chunk of
tokens. Memory: [B, T, V / chunks] at a time.

Shapes: B batch, T length, D model width, V vocabulary, P parts the mesh splits V into, C chunk columns per part.
"""

import functools

import jax
import jax.numpy as jnp

NEG_INF = -1e30


def token_log_probs(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunks: int = 8, parts: int = 1
) -> jax.Array:
    """Returns log softmax(hidden . head)[target], [B, T] float32.

    Args:
      hidden_BTD: final hidden states, in the type the products are computed in.
      head_VD: the head, one row per token; cast to the type of hidden, products accumulate in float32.
      targets_BT: int32 ids, each in [0, V).
      chunks: into how many pieces each part of the vocabulary is cut.
      parts: into how many parts the mesh splits V; a chunk takes its share of each, so no part has to move.
    """
    V, D = head_VD.shape
    columns = -(-V // (parts * chunks))
    padded_VD = jnp.pad(head_VD, ((0, parts * chunks * columns - V), (0, 0)))
    head_PXCD = padded_VD.reshape(parts, chunks, columns, D)
    return _log_probs(hidden_BTD, head_PXCD, targets_BT, V)


def _chunk_logits(hidden_BTD, head_PCD, index, columns_per_part, vocab_size):
    """Returns one chunk's logits_BTPC (padding columns at NEG_INF) and the ids_PC of its columns."""
    P, C, _ = head_PCD.shape
    ids_PC = jnp.arange(P)[:, None] * columns_per_part + index * C + jnp.arange(C)[None, :]
    logits_BTPC = jnp.einsum(
        "BTD,PCD->BTPC", hidden_BTD, head_PCD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    if P * columns_per_part != vocab_size:
        logits_BTPC = jnp.where((ids_PC < vocab_size)[None, None], logits_BTPC, NEG_INF)
    return logits_BTPC, ids_PC


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probs(hidden_BTD, head_PXCD, targets_BT, vocab_size):
    return _forward(hidden_BTD, head_PXCD, targets_BT, vocab_size)[0]


def _forward(hidden_BTD, head_PXCD, targets_BT, vocab_size):
    P, X, C, _ = head_PXCD.shape

    def step(carry, index):
        peak_BT, total_BT, target_BT = carry
        head_PCD = jax.lax.dynamic_index_in_dim(head_PXCD, index, 1, keepdims=False)
        logits_BTPC, ids_PC = _chunk_logits(hidden_BTD, head_PCD, index, X * C, vocab_size)
        new_peak_BT = jnp.maximum(peak_BT, jnp.max(logits_BTPC, axis=(2, 3)))
        chunk_BT = jnp.sum(jnp.exp(logits_BTPC - new_peak_BT[:, :, None, None]), axis=(2, 3))
        total_BT = total_BT * jnp.exp(peak_BT - new_peak_BT) + chunk_BT
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        target_BT = target_BT + jnp.sum(jnp.where(hit_BTPC, logits_BTPC, 0.0), axis=(2, 3))
        return (new_peak_BT, total_BT, target_BT), None

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    carry, _ = jax.lax.scan(step, (zeros_BT + NEG_INF, zeros_BT, zeros_BT), jnp.arange(X))
    peak_BT, total_BT, target_BT = carry
    logsumexp_BT = peak_BT + jnp.log(total_BT)
    return target_BT - logsumexp_BT, (hidden_BTD, head_PXCD, targets_BT, logsumexp_BT)


def _backward(vocab_size, residuals, grad_BT):
    """d log p(target) / d logits = onehot(target) - softmax, chunk by chunk."""
    hidden_BTD, head_PXCD, targets_BT, logsumexp_BT = residuals
    P, X, C, _ = head_PXCD.shape

    def step(grad_hidden_BTD, index):
        head_PCD = jax.lax.dynamic_index_in_dim(head_PXCD, index, 1, keepdims=False)
        logits_BTPC, ids_PC = _chunk_logits(hidden_BTD, head_PCD, index, X * C, vocab_size)
        probs_BTPC = jnp.exp(logits_BTPC - logsumexp_BT[:, :, None, None])
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        grad_BTPC = (grad_BT[:, :, None, None] * (hit_BTPC - probs_BTPC)).astype(hidden_BTD.dtype)
        grad_hidden_BTD += jnp.einsum(
            "BTPC,PCD->BTD", grad_BTPC, head_PCD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
        )
        grad_head_PCD = jnp.einsum("BTPC,BTD->PCD", grad_BTPC, hidden_BTD, preferred_element_type=jnp.float32)
        return grad_hidden_BTD, grad_head_PCD.astype(head_PXCD.dtype)

    grad_hidden_BTD, grad_head_XPCD = jax.lax.scan(step, jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.arange(X))
    return grad_hidden_BTD.astype(hidden_BTD.dtype), jnp.moveaxis(grad_head_XPCD, 0, 1), None


_log_probs.defvjp(_forward, _backward)
