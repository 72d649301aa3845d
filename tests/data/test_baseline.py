"""The counting baseline: true probabilities, on the same targets as the model, tuned on training rows alone."""

import numpy as np
import pytest

from qwen_jax.batches import LMBatch
from qwen_jax.data import baseline
from qwen_jax.errors import InputError

VOCAB = 12


def rows_of(tokens, length=50, mask=None):
    """Rows of a stream of ids, all targets scored unless a mask says otherwise."""
    count = (len(tokens) - 1) // length
    inputs, targets = (
        tokens[: count * length].reshape(count, length),
        tokens[1 : count * length + 1].reshape(count, length),
    )
    masks = np.ones((count, length), np.float32) if mask is None else mask.reshape(count, length)
    ones = np.ones(length, np.int32)
    return [LMBatch(*row, ones, ones) for row in zip(inputs, targets, masks, strict=True)]


def chain(count, seed, sharpness=0.3):
    """Ids of a Markov chain, and its transition table."""
    table = np.random.default_rng(0).dirichlet(np.full(VOCAB, sharpness), VOCAB)
    rng, tokens = np.random.default_rng(seed), [0]
    for chance in rng.random(count):
        tokens.append(min(int(np.searchsorted(np.cumsum(table[tokens[-1]]), chance)), VOCAB - 1))
    return np.array(tokens, np.int32), table


def test_on_a_markov_chain_the_bigram_reaches_the_entropy_and_the_unigram_its_own():
    (train, table), (validation, _) = chain(40_000, 1), chain(20_000, 2)
    losses = baseline.ngram_loss(rows_of(train), rows_of(validation), vocab_size=VOCAB)
    stationary = np.linalg.matrix_power(table, 200)[0]
    entropy = -(stationary[:, None] * table * np.log(np.maximum(table, 1e-300))).sum()
    assert losses["bigram"] == pytest.approx(entropy, abs=0.02)
    assert losses["unigram"] == pytest.approx(-(stationary * np.log(stationary)).sum(), abs=0.02)


@pytest.mark.parametrize("predict", [baseline._unigram, baseline._bigram])
def test_each_expert_is_a_distribution_after_every_context(predict):
    tokens, _ = chain(300, 1)
    counts = baseline._count(baseline._joined(baseline._scored_pairs(rows_of(tokens[tokens < 9]), VOCAB, "t")), VOCAB)
    context, target = (a.ravel() for a in np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij"))
    probabilities = predict(counts, baseline._Pairs(context, target, np.ones(len(target))))
    sums = probabilities.reshape(VOCAB, VOCAB, -1).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-9)


def test_the_bigram_beats_add_one_smoothing_and_plain_interpolation_on_sparse_counts():
    vocab, rng = 400, np.random.default_rng(0)
    favourites = rng.integers(0, vocab, (vocab, 30))

    def zipf(count, of):
        return rng.choice(of, count, p=(1 / np.arange(1, of + 1)) / (1 / np.arange(1, of + 1)).sum())

    def stream(count):
        """Each id is followed by one of its favourites every other time, else by what is frequent anyway."""
        tokens = [0]
        for choice, frequent, by_habit in zip(
            zipf(count, 30), zipf(count, vocab), rng.random(count) < 0.5, strict=True
        ):
            tokens.append(int(favourites[tokens[-1], choice] if by_habit else frequent))
        return np.array(tokens, np.int32)

    train, validation = stream(12_000), stream(6000)
    bigram = baseline.ngram_loss(rows_of(train), rows_of(validation), vocab_size=vocab)["bigram"]
    counts = np.zeros((vocab, vocab))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    unigram = (counts.sum(0) + 1) / (counts.sum() + vocab)
    frequencies = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    pairs = validation[:-1], validation[1:]
    add_one = -np.log((counts + 1) / (counts.sum(1, keepdims=True) + vocab))[pairs].mean()
    interpolated = min(
        -np.log(w * frequencies + (1 - w) * unigram)[pairs].mean() for w in np.linspace(0.05, 0.95, 19)
    )  # its weight is even chosen on what it is scored on
    assert bigram < interpolated - 0.05 and bigram < add_one - 0.3


def test_only_masked_in_targets_count_in_training_and_in_scoring():
    (train, _), (validation, _) = chain(5000, 1), chain(3000, 2)
    keep = [np.random.default_rng(s).integers(0, 2, n).astype(np.float32) for s, n in ((0, 5000), (1, 3000))]
    expected = baseline.ngram_loss(rows_of(train, mask=keep[0]), rows_of(validation, mask=keep[1]), vocab_size=VOCAB)

    def scramble(rows):
        noise = np.random.default_rng(5)
        return [
            row._replace(targets=np.where(row.loss_mask > 0, row.targets, noise.integers(0, VOCAB, row.targets.shape)))
            for row in rows
        ]

    changed = scramble(rows_of(train, mask=keep[0])), scramble(rows_of(validation, mask=keep[1]))
    assert baseline.ngram_loss(*changed, vocab_size=VOCAB) == expected
    assert baseline.ngram_loss(rows_of(train), rows_of(validation, mask=keep[1]), vocab_size=VOCAB) != expected


def test_rows_and_batches_of_rows_score_the_same():
    (train, _), (validation, _) = chain(5000, 1), chain(3000, 2)
    rows = rows_of(validation)
    batch = LMBatch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
    one, two = (baseline.ngram_loss(rows_of(train), v, vocab_size=VOCAB) for v in (rows, [batch]))
    assert one == pytest.approx(two, rel=1e-12)


def test_what_was_never_seen_is_unlikely_but_possible():
    train = np.tile(np.arange(4, dtype=np.int32), 300)
    unseen = np.array([7, 9, 7, 9, 7, 9], np.int32)
    losses = baseline.ngram_loss(rows_of(train), rows_of(unseen, length=5), vocab_size=VOCAB)
    assert np.log(VOCAB) < losses["unigram"] < 25 and np.log(VOCAB) < losses["bigram"] < 25


def test_one_row_is_enough_to_count():
    tokens, _ = chain(60, 1)
    assert np.isfinite(list(baseline.ngram_loss(rows_of(tokens), rows_of(tokens), vocab_size=VOCAB).values())).all()


def test_rows_without_targets_and_ids_out_of_range_are_refused():
    tokens, _ = chain(200, 1)
    blank = rows_of(tokens, mask=np.zeros(200, np.float32))
    with pytest.raises(InputError, match="^the training rows hold no target to score"):
        baseline.ngram_loss(blank, rows_of(tokens), vocab_size=VOCAB)
    with pytest.raises(InputError, match="^the validation rows hold no target to score"):
        baseline.ngram_loss(rows_of(tokens), blank, vocab_size=VOCAB)
    with pytest.raises(InputError, match=r"^training row \d+ holds id \d+; vocab_size is 5$"):
        baseline.ngram_loss(rows_of(tokens), rows_of(tokens), vocab_size=5)
