"""Rows by length: every document once an epoch, alone, in the least row that holds it; order and shares as promised."""

import collections
import itertools

import numpy as np
import pytest

from qwen_jax.data import buckets
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError


class Documents(list):
    """Document n is of tokens n, all learned."""

    def __init__(self, lengths, first=1):
        super().__init__(
            Document(np.full(length, n, np.int32), np.ones(length, bool)) for n, length in enumerate(lengths, first)
        )
        self.lengths = np.array(lengths)


LENGTHS = [3, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 31, 40, 70, 130, 5] * 3


@pytest.fixture
def rows():
    return buckets.BucketRows([Documents(LENGTHS)], 256)


def test_each_document_is_alone_in_the_least_row_that_holds_it(rows):
    assert rows.lengths == [256, 128, 64, 32] and len(rows) == len(LENGTHS)
    seen = []
    for row in rows:
        (number,) = set(row.tokens[row.segment_ids == 1].tolist())
        length, T = LENGTHS[number - 1], len(row.tokens)
        assert min(size for size in (32, 64, 128, 256) if size >= length) == T
        assert row.segment_ids.sum() == length and row.loss_mask.sum() == length - 1
        seen.append(number)
    assert sorted(seen) == list(range(1, len(LENGTHS) + 1))
    places = sum(min(size for size in (32, 64, 128, 256) if size >= length) for length in LENGTHS)
    assert rows.efficiency == pytest.approx(sum(LENGTHS) / places)


def test_batches_have_one_length_and_as_many_places_and_every_document_comes_equally_often(rows):
    drawn = buckets.batches(rows, batch_size=2, seed=3)
    places = sum(len(part) * part.length for part in rows.parts)
    epochs, count = 4, 4 * places // 512  # batches of 2 * 256 places
    times = collections.Counter()
    for batch in itertools.islice(drawn, count):
        rows_, T = batch.tokens.shape
        assert rows_ * T == 512 and T in rows.lengths
        times.update(batch.tokens[:, 0].tolist())
    assert len(times) == len(LENGTHS)
    # A part is read in whole batches, so that each may be a batch ahead of its share, or behind.
    assert all(epochs - 2 <= times[n] <= epochs + 2 for n in times)


def test_a_batch_depends_on_seed_and_number_alone_and_shares_make_it_up(rows):
    whole = list(itertools.islice(buckets.batches(rows, batch_size=4, seed=5), 12))
    later = buckets.batches(rows, batch_size=4, seed=5)
    later.set_state({"next_index": 7})
    for found, expected in zip(itertools.islice(later, 5), whole[7:], strict=True):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    shares = [
        list(itertools.islice(buckets.batches(rows, batch_size=4, seed=5, process_index=i, process_count=2), 12))
        for i in range(2)
    ]
    for first, second, expected in zip(*shares, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens]), expected.tokens)
    other = next(buckets.batches(rows, batch_size=4, seed=6))
    assert other.tokens.shape != whole[0].tokens.shape or (other.tokens != whole[0].tokens).any()


def test_weights_share_out_the_places_of_all_batches():
    few, many = Documents([40] * 90, first=1), Documents([40, 200] * 30, first=100)
    rows = buckets.BucketRows([few, many], 256, weights=[3, 1])
    drawn = list(itertools.islice(buckets.batches(rows, batch_size=2, seed=0), 100))
    assert sum(batch.tokens[0, 0] < 100 for batch in drawn) / 100 == pytest.approx(0.75, abs=0.02)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="a document has 300 tokens, the longest row holds 256"):
        buckets.BucketRows([Documents([300])], 256)
    with pytest.raises(InputError, match="batch_size 3 cannot be shared evenly by 2 processes"):
        buckets.batches(buckets.BucketRows([Documents([3])], 256), batch_size=3, seed=0, process_count=2)
