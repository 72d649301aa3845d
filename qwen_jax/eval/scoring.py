"""Log-likelihoods of continuations, many at a time in few shapes.

Shapes: B rows, T places in a row, C places that are scored at a time, D model width, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import models
from qwen_jax.config import QwenConfig
from qwen_jax.rollout.prompts import SHORTEST, bucket
from qwen_jax.sharding import Layout, constrain

AT_ONCE = 128  # places of a row whose logits exist at a time


class Scored(NamedTuple):
    """One continuation.

    Attributes:
      log_prob: the sum over its tokens.
      greedy: whether each of them is the likeliest one at its place.
    """

    log_prob: float
    greedy: bool


def score(
    config: QwenConfig,
    params: dict,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    layout: Layout,
) -> list[Scored]:
    """Scores each continuation after its context.

    Rows of like length share a batch, filled up to one of few lengths; one program is compiled for each of these.

    Args:
      config, params: the model.
      pairs: (context, continuation) ids, neither empty, at most max_position_embeddings + 1 together.
      batch_size: rows in a batch, about: a multiple of what the mesh splits it into.
      layout: mesh and rules of params.

    Returns:
      Those of the pairs, in their order.
    """
    B = bucket(min(batch_size, len(pairs)), multiple=layout.size("batch"))
    order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))  # the longest: memory shows first
    found: list[Scored | None] = [None] * len(pairs)
    for start in range(0, len(order), B):
        mine = order[start : start + B]
        arrays = _padded([pairs[place] for place in mine], B, layout.size("length"))
        log_prob_B, greedy_B = jax.device_get(_score(config, params, *arrays, layout=layout))
        for place, log_prob, greedy in zip(mine, log_prob_B, greedy_B, strict=False):
            found[place] = Scored(float(log_prob), bool(greedy))
    return found


def _padded(pairs, B: int, multiple: int) -> tuple[np.ndarray, ...]:
    """Returns tokens, targets, which targets are scored, and which places are real, each [B, T]."""
    longest = max(len(context) + len(continuation) for context, continuation in pairs) - 1
    T = bucket(longest, SHORTEST, multiple)
    tokens_BT, targets_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    scored_BT, real_BT = np.zeros((B, T), bool), np.zeros((B, T), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        ids = np.array([*context, *continuation], np.int32)
        stop = len(ids) - 1
        tokens_BT[row, :stop], targets_BT[row, :stop], real_BT[row, :stop] = ids[:-1], ids[1:], 1
        scored_BT[row, len(context) - 1 : stop] = True
    return tokens_BT, targets_BT, scored_BT, real_BT


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _score(config, params, tokens_BT, targets_BT, scored_BT, real_BT, *, layout):
    """Returns the sums [B] float32 of the scored targets' log-probabilities, and [B] bool whether all are likeliest."""
    place = lambda x_BT: constrain(x_BT, ("batch", "length"), layout)
    hidden_BTD = models.hidden_states(config, params, place(tokens_BT), segment_ids_BT=place(real_BT), layout=layout)
    B, T = tokens_BT.shape
    C = next(size for size in range(min(AT_ONCE, T), 0, -1) if T % size == 0)
    pieces = lambda x: jnp.moveaxis(x.reshape(B, T // C, C, *x.shape[2:]), 1, 0)

    def add(sums, piece):
        log_prob_B, greedy_B = sums
        hidden_BCD, targets_BC, scored_BC = piece
        logits_BCV = models.logits(config, params, hidden_BCD, layout=layout)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        log_probs_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        likeliest_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        log_prob_B += jnp.sum(jnp.where(scored_BC, log_probs_BC, 0.0), axis=1)
        return (log_prob_B, greedy_B & jnp.all(likeliest_BC | ~scored_BC, axis=1)), None

    first = jnp.zeros(B, jnp.float32), jnp.ones(B, bool)
    return jax.lax.scan(add, first, (pieces(hidden_BTD), pieces(targets_BT), pieces(scored_BT)))[0]


def windows(ids: Sequence[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Cuts a text into (context, continuation) pairs in which each of its tokens is predicted once.

    As the harness does it with a context of one token: the first pair predicts `longest` tokens after the prefix, each
    further one as many after the token before them; the last reads as much before its tokens as a row holds.

    Args:
      ids: of the text.
      prefix: what stands before the first.
      longest: how many tokens the model reads.
    """
    pairs = []
    for start in range(0, len(ids), longest):
        stop = min(start + longest, len(ids))
        context = ids[stop - longest - 1 : start] if start else [prefix]
        pairs.append((list(context), list(ids[start:stop])))
    return pairs
