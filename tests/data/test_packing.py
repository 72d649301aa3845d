"""Packing: nothing lost, nothing doubled, no document sees another, and little room wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import packing
from qwen_jax.data.conversations import Document
from qwen_jax.data.packing import PackedRows, StreamRows, best_fit
from qwen_jax.errors import InputError

from . import made_up

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(any)


def alone(document):
    """What a document asks for when it is a row by itself, from the definition: ids, targets, mask of the targets."""
    ids, mask = document
    targets = [*ids[1:], 0]
    return list(ids), targets, [*(float(m) for m in mask[1:]), 0.0]


@settings(deadline=None)  # a machine under load is no failure
@given(LENGTHS, st.integers(12, 40), st.integers(0, 9))
def test_packed_rows_hold_each_document_once_and_treat_it_as_if_it_were_alone(lengths, length, seed):
    documents = made_up.documents(lengths, seed=seed)
    rows = PackedRows(documents, length)
    found = []
    for row in rows:
        for ids, targets, mask, positions in made_up.segments(row):
            found.append((ids.tolist(), targets.tolist(), mask.tolist()))
            assert positions.tolist() == list(range(len(ids)))
    assert sorted(found) == sorted(alone(d) for d in documents if len(d.ids))


@settings(deadline=None)  # a machine under load is no failure
@given(LENGTHS, st.integers(1, 20), st.integers(0, 9))
def test_stream_rows_laid_end_to_end_are_the_documents_with_all_their_targets(lengths, length, seed):
    documents = made_up.documents(lengths, seed=seed)
    rows = StreamRows(documents, length, seed=seed)
    ids, targets, mask = [], [], []
    for number, row in enumerate(rows):
        used = np.count_nonzero(row.segment_ids)
        assert used == length or number == len(rows) - 1
        for part in made_up.segments(row):
            assert part[3].tolist() == list(range(len(part[0])))
            for into, values in zip((ids, targets, mask), part, strict=False):
                into.extend(values.tolist())
    stream = sorted((alone(d) for d in documents if len(d.ids)), key=str)
    assert len(ids) == sum(lengths)
    # The order is the seed's: take documents off the front of the stream until both are used up.
    while stream:
        here = next(d for d in stream if d == (ids[: len(d[0])], targets[: len(d[0])], mask[: len(d[0])]))
        stream.remove(here)
        for values in (ids, targets, mask):
            del values[: len(here[0])]


@settings(deadline=None)  # a machine under load is no failure
@given(LENGTHS, st.integers(1, 12))
def test_a_cut_document_goes_on_as_a_segment_of_its_own(lengths, length):
    rows = StreamRows(made_up.documents(lengths), length, seed=0)
    boundaries = {length * i for i in range(1, len(rows))}
    full = np.array([n for n in lengths if n])
    ends = set(np.cumsum(full[np.random.default_rng(0).permutation(len(full))]).tolist())
    assert sum(len(made_up.segments(row)) for row in rows) == len(ends | boundaries)


@settings(deadline=None)  # a machine under load is no failure
@given(st.lists(st.integers(0, 50), max_size=200), st.integers(50, 70))
def test_best_fit_never_overfills_and_leaves_no_two_bins_that_could_be_one(lengths, capacity):
    bins = best_fit(np.array(lengths, np.int64), capacity)
    assert [b < 0 for b in bins] == [n == 0 for n in lengths]
    filled = np.bincount(bins[bins >= 0], np.array(lengths)[bins >= 0]) if any(lengths) else np.zeros(0)
    assert (filled > 0).all() and (filled <= capacity).all()
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > capacity


def test_best_fit_is_the_best_fit_not_the_first():
    # 6 and 5 open bins with rooms 4 and 5; 4 fits both, and belongs where it leaves nothing.
    assert best_fit(np.array([5, 6, 4]), 10).tolist() == [1, 0, 0]


def test_rows_depend_on_seed_and_documents_alone():
    documents = made_up.documents([5, 9, 3, 7, 30, 2] * 4)
    one, two, other = (StreamRows(documents, 16, seed=seed) for seed in (3, 3, 4))
    assert all((a == b).all() for i in range(len(one)) for a, b in zip(one[i], two[i], strict=True))
    assert any((one[i].tokens != other[i].tokens).any() for i in range(len(one)))


def test_a_hundred_thousand_chat_sized_documents_pack_tightly_and_soon():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.9, 1.2, 100_000), 2, 2048).astype(np.int64)
    bins = best_fit(lengths, 2048)
    assert lengths.sum() / ((bins.max() + 1) * 2048) >= 0.98


def test_efficiency_is_the_share_of_places_that_hold_a_token():
    documents = made_up.documents([6, 6, 3])
    assert PackedRows(documents, 10).efficiency == 15 / 20
    assert StreamRows(documents, 10, seed=0).efficiency == 15 / 20


def test_rows_have_the_types_of_an_lm_batch():
    for row in (
        PackedRows(made_up.documents([4, 3]), 8)[0],
        StreamRows(made_up.documents([9]), 8, seed=0)[-1],
        packing.row((), 8),
    ):
        assert [a.dtype for a in row] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        assert {a.shape for a in row} == {(8,)}


def test_a_document_longer_than_a_row_is_refused_with_its_number():
    with pytest.raises(InputError, match=r"^document 1 has 9 tokens, a packed row holds 8: .*too_long"):
        PackedRows(made_up.documents([3, 9]), 8)


@pytest.mark.parametrize("make", [PackedRows, lambda d, n: StreamRows(d, n, seed=0)])
def test_nothing_to_pack_is_refused(make):
    with pytest.raises(InputError, match="^there is nothing to pack: 2 documents hold no tokens$"):
        make(made_up.documents([0, 0]), 8)
    with pytest.raises(InputError, match="nothing to pack"):
        make([], 8)
    with pytest.raises(InputError, match="at least 1"):
        make([Document(np.ones(1, np.int32), np.ones(1, bool))], 0)


def test_rows_end_where_their_number_says():
    rows = PackedRows(made_up.documents([4, 3]), 8)
    assert len(list(rows)) == len(rows) == 1
    with pytest.raises(IndexError):
        rows[1]
