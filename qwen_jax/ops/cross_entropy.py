"""Log-probabilities of given tokens without ever holding the logits of a whole vocabulary.

The vocabulary is walked in chunks: the forward pass keeps a running logsumexp, the backward pass forms each chunk's
logits again. Per chunk the gradient of the head is complete, so under fsdp it is reduced once, not once per chunk of
tokens. Memory: [B, T, V / chunks] at a time.

A head that is not differentiated (frozen, beside LoRA adapters) saves half of the products: the gradient of the hidden
state is then a sum of head rows that the forward pass collects on its way, as flash attention collects its values.

Shapes: B batch, T length, D model width, V vocabulary, P parts the mesh splits V into, C chunk columns per part, n rows
that are trained apart.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

NEG_INF = -1e30


def token_log_probs(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunks: int = 8,
    parts: int = 1,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Returns log softmax(hidden . head)[target], [B, T] float32.

    Args:
      hidden_BTD: final hidden states, in the type the products are computed in.
      head_VD: the head, one row per token; cast to the type of hidden, products accumulate in float32.
      targets_BT: int32 ids, each in [0, V).
      chunks: into how many pieces each part of the vocabulary is cut.
      parts: into how many parts the mesh splits V; a chunk takes its share of each, so no part has to move.
      rows: ids [n] and rows [n, D] that stand for those of the head, and are differentiated apart from it.
    """
    V, D = head_VD.shape
    columns = -(-V // (parts * chunks))
    padded_VD = jnp.pad(head_VD, ((0, parts * chunks * columns - V), (0, 0)))
    head_PXCD = padded_VD.reshape(parts, chunks, columns, D)
    ids_n = jnp.zeros((0,), jnp.int32) if rows is None else rows[0]
    target_BT, logsumexp_BT = _scores(hidden_BTD, head_PXCD, targets_BT, ids_n, V)
    if rows is None:
        return target_BT - logsumexp_BT
    logits_BTn = jnp.einsum(
        "BTD,nD->BTn", hidden_BTD, rows[1].astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    hit_BTn = targets_BT[:, :, None] == ids_n[None, None]
    own_BT = jnp.sum(jnp.where(hit_BTn, logits_BTn, 0.0), axis=-1)
    target_BT = jnp.where(jnp.any(hit_BTn, axis=-1), own_BT, target_BT)
    return target_BT - jnp.logaddexp(logsumexp_BT, jax.nn.logsumexp(logits_BTn, axis=-1))


def _chunk(head_PXCD, index):
    return jax.lax.dynamic_index_in_dim(head_PXCD, index, 1, keepdims=False)


def _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, vocab_size):
    """Returns one chunk's logits_BTPC (padding and removed columns at NEG_INF) and the ids_PC of its columns."""
    P, X, C, _ = head_PXCD.shape
    ids_PC = jnp.arange(P)[:, None] * (X * C) + index * C + jnp.arange(C)[None, :]
    logits_BTPC = jnp.einsum(
        "BTD,PCD->BTPC", hidden_BTD, _chunk(head_PXCD, index).astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    kept_PC = ids_PC < vocab_size
    if removed_n.size:
        kept_PC &= ~jnp.any(ids_PC[:, :, None] == removed_n[None, None], axis=-1)
    if removed_n.size or vocab_size != P * X * C:
        logits_BTPC = jnp.where(kept_PC[None, None], logits_BTPC, NEG_INF)
    return logits_BTPC, ids_PC


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(hidden_BTD, head_PXCD, targets_BT, removed_n, vocab_size):
    """Returns each target's logit and the logsumexp over the columns that are not removed, both [B, T] float32."""
    return _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, vocab_size, collect=False)[:2]


def _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, vocab_size, *, collect: bool):
    """Returns the scores; collecting also sum_v softmax_v head_v and head_target, which are d scores / d hidden."""
    P, X, C, _ = head_PXCD.shape

    def step(carry, index):
        peak_BT, total_BT, target_BT, *collected = carry
        logits_BTPC, ids_PC = _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, vocab_size)
        new_peak_BT = jnp.maximum(peak_BT, jnp.max(logits_BTPC, axis=(2, 3)))
        exp_BTPC = jnp.exp(logits_BTPC - new_peak_BT[:, :, None, None])
        decay_BT = jnp.exp(peak_BT - new_peak_BT)
        total_BT = total_BT * decay_BT + jnp.sum(exp_BTPC, axis=(2, 3))
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        target_BT = target_BT + jnp.sum(jnp.where(hit_BTPC, logits_BTPC, 0.0), axis=(2, 3))
        if collect:
            mean_BTD, row_BTD = collected
            head_PCD = _chunk(head_PXCD, index).astype(hidden_BTD.dtype)
            mean_BTD = mean_BTD * decay_BT[..., None] + jnp.einsum(
                "BTPC,PCD->BTD", exp_BTPC.astype(hidden_BTD.dtype), head_PCD, preferred_element_type=jnp.float32
            )
            collected = (mean_BTD, row_BTD + _targets_rows(head_PCD, targets_BT, ids_PC))
        return (new_peak_BT, total_BT, target_BT, *collected), None

    zeros_BT, zeros_BTD = jnp.zeros(targets_BT.shape, jnp.float32), jnp.zeros(hidden_BTD.shape, jnp.float32)
    first = (zeros_BT + NEG_INF, zeros_BT, zeros_BT, *((zeros_BTD, zeros_BTD.astype(hidden_BTD.dtype)) * collect))
    (peak_BT, total_BT, target_BT, *collected), _ = jax.lax.scan(step, first, jnp.arange(X))
    logsumexp_BT = peak_BT + jnp.log(total_BT)
    if not collect:
        return target_BT, logsumexp_BT
    mean_BTD, row_BTD = collected
    return target_BT, logsumexp_BT, (mean_BTD / total_BT[..., None]).astype(hidden_BTD.dtype), row_BTD


def _targets_rows(head_PCD, targets_BT, ids_PC):
    """Returns each target's row of the head, zeros where another chunk has it; each part of the mesh reads its own."""
    place_PBT = targets_BT[None] - ids_PC[:, :1, None]
    here_PBT = (place_PBT >= 0) & (place_PBT < head_PCD.shape[1])
    take = jax.vmap(lambda head_CD, place_BT: head_CD.at[place_BT].get(mode="clip"))
    return jnp.sum(jnp.where(here_PBT[..., None], take(head_PCD, place_PBT), 0), axis=0, dtype=head_PCD.dtype)


def _forward(hidden_BTD, head_PXCD, targets_BT, removed_n, vocab_size):
    frozen = not head_PXCD.perturbed
    hidden_BTD, head_PXCD, targets_BT, removed_n = (arg.value for arg in (hidden_BTD, head_PXCD, targets_BT, removed_n))
    found = _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, vocab_size, collect=frozen)
    kept = found[2:] if frozen else (hidden_BTD, head_PXCD, targets_BT, removed_n, found[1])
    return found[:2], kept


def _backward(vocab_size, kept, grads):
    """d target = onehot(target), d logsumexp = softmax, in the space of logits, chunk by chunk."""
    of_target_BT, of_sum_BT = (
        jnp.zeros(grad.shape, grad.dtype) if isinstance(grad, SymbolicZero) else grad for grad in grads
    )
    if len(kept) == 2:  # the head is frozen
        mean_BTD, row_BTD = kept
        grad_BTD = of_target_BT[..., None] * row_BTD + of_sum_BT[..., None] * mean_BTD
        return grad_BTD.astype(row_BTD.dtype), None, None, None
    hidden_BTD, head_PXCD, targets_BT, removed_n, logsumexp_BT = kept

    def step(grad_hidden_BTD, index):
        logits_BTPC, ids_PC = _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, vocab_size)
        probs_BTPC = jnp.exp(logits_BTPC - logsumexp_BT[:, :, None, None])
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        grad_BTPC = of_target_BT[:, :, None, None] * hit_BTPC + of_sum_BT[:, :, None, None] * probs_BTPC
        grad_BTPC = grad_BTPC.astype(hidden_BTD.dtype)
        grad_hidden_BTD += jnp.einsum(
            "BTPC,PCD->BTD", grad_BTPC, _chunk(head_PXCD, index).astype(hidden_BTD.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        grad_head_PCD = jnp.einsum("BTPC,BTD->PCD", grad_BTPC, hidden_BTD, preferred_element_type=jnp.float32)
        return grad_hidden_BTD, grad_head_PCD.astype(head_PXCD.dtype)

    X = head_PXCD.shape[1]
    grad_hidden_BTD, grad_head_XPCD = jax.lax.scan(step, jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.arange(X))
    return grad_hidden_BTD.astype(hidden_BTD.dtype), jnp.moveaxis(grad_head_XPCD, 0, 1), None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)
