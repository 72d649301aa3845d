"""Batches: every row once an epoch, the same whatever the processes, and exact resume."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import loader
from qwen_jax.data.packing import MixedRows, PackedRows
from qwen_jax.errors import InputError

from . import made_up

LENGTH = 8


def numbered_rows(count):
    """Rows that can be told apart: row i holds the token i + 1 throughout."""
    documents = made_up.documents([LENGTH] * count)
    for number, document in enumerate(documents):
        document.ids[:] = number + 1
    return PackedRows(documents, LENGTH)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def row_numbers(batches):
    return [int(t) - 1 for batch in batches for t in batch.tokens[:, 0]]


def same(one, two):
    return len(one) == len(two) and all(
        (a == b).all() and a.dtype == b.dtype for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 23), st.sampled_from([2, 4, 6]), st.integers(0, 2**40), st.booleans())
def test_each_epoch_reads_every_row_once(count, batch_size, seed, shuffle):
    iterator = loader.batches(numbered_rows(count), batch_size=batch_size, seed=seed, shuffle=shuffle)
    numbers = row_numbers(take(iterator, 3 * count // batch_size + 1))
    iterator.close()
    for epoch in range(3):
        assert sorted(numbers[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    def epochs(seed):
        numbers = row_numbers(take(loader.batches(numbered_rows(40), batch_size=40, seed=seed), 3))
        return [tuple(numbers[i : i + 40]) for i in (0, 40, 80)]

    assert len({*epochs(0), *epochs(1), *epochs(2)}) == 9


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_together_read_the_batch_of_one_process(count):
    rows = numbered_rows(17)
    whole = take(loader.batches(rows, batch_size=6, seed=5), 9)
    shares = [
        take(loader.batches(rows, batch_size=6, seed=5, process_index=i, process_count=count), 9) for i in range(count)
    ]
    together = [
        type(b[0])(*(np.concatenate(arrays) for arrays in zip(*b, strict=True))) for b in zip(*shares, strict=True)
    ]
    assert same(whole, together)


@pytest.mark.parametrize("step", [0, 1, 4, 13])
def test_resume_is_exact_at_any_step_and_on_another_number_of_processes(step):
    rows = numbered_rows(11)
    iterator = loader.batches(rows, batch_size=4, seed=1)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    used = loader.batches(rows, batch_size=4, seed=1)
    take(used, 7)
    for resumed in (loader.batches(rows, batch_size=4, seed=1), used):
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert same(take(resumed, 5), expected)
    half = loader.batches(rows, batch_size=4, seed=1, process_index=1, process_count=2)
    half.set_state(state)
    assert row_numbers(take(half, 5)) == [n for b in expected for n in row_numbers([b])[2:]]


def test_the_position_is_the_number_of_batches_taken():
    iterator = loader.batches(numbered_rows(11), batch_size=4, seed=1)
    take(iterator, 6)
    assert iterator.get_state() == {"next_index": 6}


PROGRAM = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
from qwen_jax.data import loader
from tests.data.test_loader import numbered_rows, row_numbers
it = loader.batches(numbered_rows(11), batch_size=4, seed=1)
it.set_state(json.loads(sys.argv[1]))
for _ in range(3):
    print(json.dumps([row_numbers([next(it)]), it.get_state()]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_would_have_read_next_is_read_by_another(request):
    iterator = loader.batches(numbered_rows(11), batch_size=4, seed=1)
    first = row_numbers([next(iterator)])
    program = PROGRAM.format(root=str(request.config.rootpath))
    command = [sys.executable, "-c", program, json.dumps(iterator.get_state())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    resumed = loader.batches(numbered_rows(11), batch_size=4, seed=1)
    resumed.set_state(lines[-1][1])
    seen = [first, *(numbers for numbers, _ in lines), *(row_numbers([next(resumed)]) for _ in range(3))]
    assert seen == [row_numbers([b]) for b in take(loader.batches(numbered_rows(11), batch_size=4, seed=1), 7)]


@pytest.mark.parametrize("count", [8, 9, 3])
def test_evaluation_reads_every_row_once_in_order_and_fills_up_with_nothing(count):
    batches = list(loader.evaluation(numbered_rows(count), batch_size=4))
    assert {b.tokens.shape for b in batches} == {(4, LENGTH)}
    numbers = row_numbers(batches)
    assert numbers[:count] == list(range(count))
    for array in batches[-1]:
        assert not array[4 - (len(numbers) - count) :].any() or len(numbers) == count
    assert len(numbers) - count < 4


def test_evaluation_shares_are_equally_many_batches_of_one_shape():
    rows = numbered_rows(5)
    shares = [list(loader.evaluation(rows, batch_size=4, process_index=i, process_count=2)) for i in range(2)]
    assert [len(s) for s in shares] == [2, 2]
    assert row_numbers(shares[0]) == [0, 1, 4, -1] and row_numbers(shares[1]) == [2, 3, -1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 cannot be shared evenly by 4 processes"),
        ({"batch_size": 0}, "batch_size 0 cannot be shared"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index 2 is not one of 2 processes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        loader.batches(numbered_rows(5), seed=0, **arguments)


def test_no_rows_is_refused():
    with pytest.raises(InputError, match="no rows"):
        loader.batches([], batch_size=1, seed=0)


def mixed(*counts, weights):
    """Parts whose rows hold the tokens 1…, 1001…, 2001…"""
    parts = [numbered_rows(count) for count in counts]
    for place, part in enumerate(parts):
        for document in part._documents:
            document.ids[:] += 1000 * place
    return MixedRows(parts, weights)


@pytest.mark.parametrize("weights", [(0.75, 0.25), (3, 1), (0.1, 0.9)])
def test_a_mixture_draws_by_weight_and_goes_through_each_part_evenly(weights):
    rows = mixed(7, 5, weights=weights)
    numbers = row_numbers(take(loader.batches(rows, batch_size=4, seed=3), 60))
    parts = [[n % 1000 for n in numbers if n // 1000 == place] for place in range(2)]
    share = weights[0] / sum(weights)
    assert abs(len(parts[0]) / 240 - share) < 0.01
    for count, part in zip((7, 5), parts, strict=True):
        epochs = [part[i : i + count] for i in range(0, len(part) - count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    for end in range(20, 240, 20):  # at any time
        assert abs(sum(n < 1000 for n in numbers[:end]) - share * end) <= 2


def test_the_parts_of_a_mixture_are_shuffled_apart():
    numbers = row_numbers(take(loader.batches(mixed(40, 40, weights=(1, 1)), batch_size=4, seed=3), 20))
    assert [n for n in numbers if n < 1000] != [n - 1000 for n in numbers if n >= 1000]


def test_a_mixture_resumes_exactly_on_another_number_of_processes():
    rows = mixed(7, 5, weights=(0.6, 0.4))
    iterator = loader.batches(rows, batch_size=4, seed=1)
    take(iterator, 9)
    state = iterator.get_state()
    expected = row_numbers(take(iterator, 5))
    shares = [loader.batches(rows, batch_size=4, seed=1, process_index=i, process_count=2) for i in range(2)]
    for share in shares:
        share.set_state(state)
    found = [row_numbers([next(share)]) for _ in range(5) for share in shares]
    assert state == {"next_index": 9} and sum(found, []) == expected


def test_a_mixture_is_evaluated_row_by_row_and_its_first_rows_are_of_all_parts():
    rows = mixed(7, 5, weights=(0.6, 0.4))
    whole = [*range(7), *range(1000, 1005)]
    assert row_numbers(loader.evaluation(rows, batch_size=4)) == whole
    assert [int(row.tokens[0]) - 1 for row in rows.first(5)] == [0, 1, 2, 1000, 1001]
    assert len(rows) == 12 and int(rows[-1].tokens[0]) - 1 == 1004 and rows.efficiency == 1
