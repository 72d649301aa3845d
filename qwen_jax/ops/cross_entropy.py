"""Log-probabilities of given tokens without holding the logits of a whole vocabulary, unless it is asked for.

The vocabulary is walked in chunks: the forward pass keeps a running logsumexp, the backward pass forms each chunk's
logits again, or reads them where they are kept. Per chunk the gradient of the head is complete, so under fsdp it is
reduced once, not once per chunk of tokens. Memory: [B, T, V / chunks] at a time, with `keep` [B, T, V].

A head that is not differentiated (frozen, beside LoRA adapters) saves half of the products: the gradient of the hidden
state is then a sum of head rows that the forward pass collects on its way, as flash attention collects its values.

Shapes: B batch, T length, D model width, V vocabulary, P parts the mesh splits V into, C chunk columns per part, n rows
that are trained apart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from qwen_jax.ops.products import product

NEG_INF = -1e30


def token_log_probs(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunks: int = 8,
    parts: int = 1,
    joined: bool = False,
    keep: bool = False,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Returns log softmax(hidden . head)[target], [B, T] float32.

    Args:
      hidden_BTD: final hidden states, in the type the products are computed in.
      head_VD: the head, one row per token; cast to the type of hidden, products accumulate in float32.
      targets_BT: int32 ids, each in [0, V).
      chunks: into how many pieces each part of the vocabulary is cut.
      parts: into how many parts the mesh splits V; a chunk takes its share of each, so no part has to move.
      joined: whether all is on one CPU, where XLA then copies less (`ops.products`).
      keep: whether the logits of all chunks wait for the backward pass, [B, T, V] float32: a fourth fewer products.
      rows: ids [n] and rows [n, D] that stand for those of the head, and are differentiated apart from it.
    """
    V, D = head_VD.shape
    columns = -(-V // (parts * chunks))
    padded_VD = jnp.pad(head_VD, ((0, parts * chunks * columns - V), (0, 0)))
    head_PXCD = padded_VD.reshape(parts, chunks, columns, D)
    ids_n = jnp.zeros((0,), jnp.int32) if rows is None else rows[0]
    target_BT, logsumexp_BT = _scores(hidden_BTD, head_PXCD, targets_BT, ids_n, How(V, joined, keep))
    if rows is None:
        return target_BT - logsumexp_BT
    logits_BTn = jnp.einsum(
        "BTD,nD->BTn", hidden_BTD, rows[1].astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    hit_BTn = targets_BT[:, :, None] == ids_n[None, None]
    own_BT = jnp.sum(jnp.where(hit_BTn, logits_BTn, 0.0), axis=-1)
    target_BT = jnp.where(jnp.any(hit_BTn, axis=-1), own_BT, target_BT)
    return target_BT - jnp.logaddexp(logsumexp_BT, jax.nn.logsumexp(logits_BTn, axis=-1))


class How(NamedTuple):
    """What is known before tracing: the head's rows without padding; `joined` and `keep` of `token_log_probs`."""

    vocab_size: int
    joined: bool
    keep: bool


def _chunk(head_PXCD, index):
    return jax.lax.dynamic_index_in_dim(head_PXCD, index, 1, keepdims=False)


def _ids(head_PXCD, index):
    """Returns the ids_PC of a chunk's columns."""
    P, X, C, _ = head_PXCD.shape
    return jnp.arange(P)[:, None] * (X * C) + index * C + jnp.arange(C)[None, :]


def _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, how: How):
    """Returns one chunk's logits_BTPC, padding and removed columns at NEG_INF."""
    P, X, C, _ = head_PXCD.shape
    ids_PC = _ids(head_PXCD, index)
    logits_BTPC = product(
        "BTD,PCD->BTPC", hidden_BTD, _chunk(head_PXCD, index).astype(hidden_BTD.dtype),
        joined=how.joined, preferred_element_type=jnp.float32,
    )  # fmt: skip
    kept_PC = ids_PC < how.vocab_size
    if removed_n.size:
        kept_PC &= ~jnp.any(ids_PC[:, :, None] == removed_n[None, None], axis=-1)
    if removed_n.size or how.vocab_size != P * X * C:
        logits_BTPC = jnp.where(kept_PC[None, None], logits_BTPC, NEG_INF)
    return logits_BTPC


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(hidden_BTD, head_PXCD, targets_BT, removed_n, how: How):
    """Returns each target's logit and the logsumexp over the columns that are not removed, both [B, T] float32."""
    return _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, how._replace(keep=False), collect=False)[0]


def _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, how: How, *, collect: bool):
    """Returns the scores, what was collected and what was kept.

    Collected are sum_v softmax_v head_v and head_target, which are d scores / d hidden; kept are logits_XBTPC.
    """
    X = head_PXCD.shape[1]

    def step(carry, index):
        peak_BT, total_BT, target_BT, *collected = carry
        logits_BTPC, ids_PC = _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, how), _ids(head_PXCD, index)
        new_peak_BT = jnp.maximum(peak_BT, jnp.max(logits_BTPC, axis=(2, 3)))
        exp_BTPC = jnp.exp(logits_BTPC - new_peak_BT[:, :, None, None])
        decay_BT = jnp.exp(peak_BT - new_peak_BT)
        total_BT = total_BT * decay_BT + jnp.sum(exp_BTPC, axis=(2, 3))
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        target_BT = target_BT + jnp.sum(jnp.where(hit_BTPC, logits_BTPC, 0.0), axis=(2, 3))
        if collect:
            mean_BTD, row_BTD = collected
            head_PCD = _chunk(head_PXCD, index).astype(hidden_BTD.dtype)
            mean_BTD = mean_BTD * decay_BT[..., None] + product(
                "BTPC,PCD->BTD", exp_BTPC.astype(hidden_BTD.dtype), head_PCD,
                joined=how.joined, preferred_element_type=jnp.float32,
            )  # fmt: skip
            collected = (mean_BTD, row_BTD + _targets_rows(head_PCD, targets_BT, ids_PC))
        return (new_peak_BT, total_BT, target_BT, *collected), logits_BTPC if how.keep and not collect else None

    zeros_BT, zeros_BTD = jnp.zeros(targets_BT.shape, jnp.float32), jnp.zeros(hidden_BTD.shape, jnp.float32)
    first = (zeros_BT + NEG_INF, zeros_BT, zeros_BT, *((zeros_BTD, zeros_BTD.astype(hidden_BTD.dtype)) * collect))
    (peak_BT, total_BT, target_BT, *collected), logits_XBTPC = jax.lax.scan(step, first, jnp.arange(X))
    scores = target_BT, peak_BT + jnp.log(total_BT)
    if collect:
        mean_BTD, row_BTD = collected
        collected = (mean_BTD / total_BT[..., None]).astype(hidden_BTD.dtype), row_BTD
    return scores, collected, logits_XBTPC


def _targets_rows(head_PCD, targets_BT, ids_PC):
    """Returns each target's row of the head, zeros where another chunk has it; each part of the mesh reads its own."""
    place_PBT = targets_BT[None] - ids_PC[:, :1, None]
    here_PBT = (place_PBT >= 0) & (place_PBT < head_PCD.shape[1])
    take = jax.vmap(lambda head_CD, place_BT: head_CD.at[place_BT].get(mode="clip"))
    return jnp.sum(jnp.where(here_PBT[..., None], take(head_PCD, place_PBT), 0), axis=0, dtype=head_PCD.dtype)


def _forward(hidden_BTD, head_PXCD, targets_BT, removed_n, how):
    frozen = not head_PXCD.perturbed
    hidden_BTD, head_PXCD, targets_BT, removed_n = (arg.value for arg in (hidden_BTD, head_PXCD, targets_BT, removed_n))
    scores, collected, logits = _walk(hidden_BTD, head_PXCD, targets_BT, removed_n, how, collect=frozen)
    return scores, collected if frozen else (hidden_BTD, head_PXCD, targets_BT, removed_n, scores[1], logits)


def _backward(how, kept, grads):
    """d target = onehot(target), d logsumexp = softmax, in the space of logits, chunk by chunk."""
    of_target_BT, of_sum_BT = (
        jnp.zeros(grad.shape, grad.dtype) if isinstance(grad, SymbolicZero) else grad for grad in grads
    )
    if len(kept) == 2:  # the head is frozen
        mean_BTD, row_BTD = kept
        grad_BTD = of_target_BT[..., None] * row_BTD + of_sum_BT[..., None] * mean_BTD
        return grad_BTD.astype(row_BTD.dtype), None, None, None
    hidden_BTD, head_PXCD, targets_BT, removed_n, logsumexp_BT, logits_XBTPC = kept

    def step(grad_hidden_BTD, chunk):
        index, logits_BTPC = chunk
        if not how.keep:
            logits_BTPC = _chunk_logits(hidden_BTD, head_PXCD, index, removed_n, how)
        ids_PC = _ids(head_PXCD, index)
        probs_BTPC = jnp.exp(logits_BTPC - logsumexp_BT[:, :, None, None])
        hit_BTPC = targets_BT[:, :, None, None] == ids_PC[None, None]
        grad_BTPC = of_target_BT[:, :, None, None] * hit_BTPC + of_sum_BT[:, :, None, None] * probs_BTPC
        grad_BTPC = grad_BTPC.astype(hidden_BTD.dtype)
        grad_hidden_BTD += product(
            "BTPC,PCD->BTD", grad_BTPC, _chunk(head_PXCD, index).astype(hidden_BTD.dtype),
            joined=how.joined, preferred_element_type=jnp.float32,
        )  # fmt: skip
        grad_head_PCD = product(
            "BTPC,BTD->PCD", grad_BTPC, hidden_BTD, joined=how.joined, preferred_element_type=jnp.float32
        )  # fmt: skip
        return grad_hidden_BTD, grad_head_PCD.astype(head_PXCD.dtype)

    chunks = jnp.arange(head_PXCD.shape[1]), logits_XBTPC
    grad_hidden_BTD, grad_head_XPCD = jax.lax.scan(step, jnp.zeros(hidden_BTD.shape, jnp.float32), chunks)
    return grad_hidden_BTD.astype(hidden_BTD.dtype), jnp.moveaxis(grad_head_XPCD, 0, 1), None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)
