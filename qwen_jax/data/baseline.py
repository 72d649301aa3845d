"""What counting achieves: unigram and bigram losses on exactly the targets a model is scored on.

The bigram is a strong one, so that beating it means something: interpolated modified Kneser-Ney (Chen & Goodman 1999),
its three discounts estimated from the counts, mixed with absolute discounting over the unigram, with plain pair
frequencies, the unigram and the uniform distribution, by weights that are fitted (EM) on a slice of the training rows.
The validation rows are only ever scored.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.batches import LMBatch
from qwen_jax.errors import InputError

HELD_OUT = 10  # every tenth training row is set aside to fit the weights; the final counts are over all rows
LEAST_WEIGHT = 1e-5  # of the uniform distribution among others: nothing is impossible


class _Pairs(NamedTuple):
    """Scored targets: context [n] and target [n], int64, and weight [n], float64."""

    context: np.ndarray
    target: np.ndarray
    weight: np.ndarray


class _Counts(NamedTuple):
    """What was counted in training pairs. V ids, K distinct pairs.

    Attributes:
      keys: [K] sorted, context * V + target.
      counts: [K].
      discounts: [K], what is taken from each count.
      context_totals: [V], pairs with this context.
      context_discounts: [V], what was taken from them together.
      unigram, continuation: [V] distributions: how often a target occurs, and after how many different contexts.
    """

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    context_totals: np.ndarray
    context_discounts: np.ndarray
    unigram: np.ndarray
    continuation: np.ndarray


def ngram_loss(train: Sequence[LMBatch], validation: Iterable[LMBatch], *, vocab_size: int) -> dict[str, float]:
    """Losses of a unigram and a bigram model on the validation targets (positions where loss_mask > 0).

    Args:
      train: rows or batches to count, arrays [T] or [B, T].
      validation: rows or batches to score.
      vocab_size: V, the number of ids.

    Returns:
      {"unigram": ..., "bigram": ...}: nats per target token, a mean weighted by loss_mask.

    Raises:
      InputError: there are no targets, or an id is not below vocab_size.
    """
    rows = _scored_pairs(train, vocab_size, "training")
    scored = _joined(_scored_pairs(validation, vocab_size, "validation"))
    held_out = _joined(rows[::HELD_OUT])
    part = _count(_joined([row for i, row in enumerate(rows) if i % HELD_OUT] or rows), vocab_size)
    whole = _count(_joined(rows), vocab_size)

    def loss(predict: Callable[[_Counts, _Pairs], np.ndarray]) -> float:
        weights = _fit_weights(predict(part, held_out), held_out.weight)
        return float(np.average(-np.log(predict(whole, scored) @ weights), weights=scored.weight))

    return {"unigram": loss(_unigram), "bigram": loss(_bigram)}


def _scored_pairs(rows: Iterable[LMBatch], vocab_size: int, name: str) -> list[_Pairs]:
    """The pairs of each row that has any."""
    found = []
    for number, row in enumerate(rows):
        chosen = row.loss_mask > 0
        pairs = _Pairs(
            row.tokens[chosen].astype(np.int64),
            row.targets[chosen].astype(np.int64),
            row.loss_mask[chosen].astype(float),
        )
        if not chosen.any():
            continue
        highest = max(pairs.context.max(), pairs.target.max())
        if highest >= vocab_size:
            raise InputError(f"{name} row {number} holds id {highest}; vocab_size is {vocab_size}")
        found.append(pairs)
    if not found:
        raise InputError(f"the {name} rows hold no target to score: loss_mask is 0 throughout")
    return found


def _joined(rows: Sequence[_Pairs]) -> _Pairs:
    return _Pairs(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))


def _count(pairs: _Pairs, vocab_size: int) -> _Counts:
    keys, counts = np.unique(pairs.context * vocab_size + pairs.target, return_counts=True)
    contexts, targets = np.divmod(keys, vocab_size)
    discounts = _discounts(counts)[np.minimum(counts, 3)]

    def per_id(ids, amounts):
        return np.bincount(ids, amounts, minlength=vocab_size)

    return _Counts(
        keys=keys,
        counts=counts,
        discounts=discounts,
        context_totals=per_id(contexts, counts),
        context_discounts=per_id(contexts, discounts),
        unigram=per_id(targets, counts) / counts.sum(),
        continuation=per_id(targets, np.ones(len(keys))) / len(keys),
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """[4] discounts of counts 0, 1, 2 and 3 or more: Chen & Goodman's estimate from the counts of counts."""
    n1, n2, n3, n4 = (max(1, np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # On little data the estimate can leave the range that makes sense; something must be left to give and to take.
    return np.clip(estimate, [0, 0.1, 0.1, 0.1], [0, 0.9, 1.8, 2.7])


def _unigram(counts: _Counts, pairs: _Pairs) -> np.ndarray:
    """[n, 2] probabilities of the targets: by frequency, uniform."""
    uniform = np.full(len(pairs.target), 1 / len(counts.unigram))
    return np.column_stack([counts.unigram[pairs.target], uniform])


def _bigram(counts: _Counts, pairs: _Pairs) -> np.ndarray:
    """[n, 5] probabilities of the targets: Kneser-Ney; the same over the unigram; pair frequency; those of `_unigram`.

    The discounts enter linearly, so a mixture of the first with the undiscounted third is Kneser-Ney with smaller ones.
    """
    key = pairs.context * len(counts.unigram) + pairs.target
    place = np.minimum(np.searchsorted(counts.keys, key), len(counts.keys) - 1)
    seen = counts.keys[place] == key
    count, discount = np.where(seen, counts.counts[place], 0), np.where(seen, counts.discounts[place], 0)
    total, given = counts.context_totals[pairs.context], counts.context_discounts[pairs.context]
    continuation, unigram = counts.continuation[pairs.target], counts.unigram[pairs.target]
    with np.errstate(invalid="ignore"):
        experts = [
            np.where(total > 0, numerator / total, lower)  # after a new context only the lower order knows anything
            for numerator, lower in (
                (count - discount + given * continuation, continuation),
                (count - discount + given * unigram, unigram),
                (count, unigram),
            )
        ]
    return np.column_stack([*experts, _unigram(counts, pairs)])


def _fit_weights(probabilities: np.ndarray, weight: np.ndarray, steps: int = 50) -> np.ndarray:
    """Mixture weights that maximise the likelihood of [n, m] probabilities, by expectation maximisation."""
    mixture = np.full(probabilities.shape[1], 1 / probabilities.shape[1])
    for _ in range(steps):
        share = probabilities * mixture
        share *= (weight / share.sum(axis=1))[:, None]
        mixture = np.maximum(share.sum(axis=0) / weight.sum(), LEAST_WEIGHT)
        mixture /= mixture.sum()
    return mixture
