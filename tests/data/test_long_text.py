"""Long documents made of short ones, sequences of mixed lengths, and pass keys that can be found again by reading."""

import re

import numpy as np
import pytest

from qwen_jax import tokenizer
from qwen_jax.data import long_text
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError

TOKENIZER = tokenizer.train(["The pass key is 1. What is the pass key? Remember it."] * 9, vocab_size=280)


def document(ids):
    return Document(np.asarray(ids, np.int32), np.ones(len(ids), bool))


def words(count):
    """Text without a digit, as ids."""
    return document((TOKENIZER.encode("some words and more ") * count)[:count])


def test_joined_is_every_document_whole_in_another_order_for_another_seed():
    parts = [document([number] * number) for number in range(1, 9)]
    orders = []
    for seed in (0, 1):
        found = long_text.joined(parts, seed=seed).ids
        starts = np.flatnonzero(np.diff(found, prepend=0))
        assert sorted(found[starts]) == list(range(1, 9)) and len(found) == sum(range(1, 9))
        assert all((found[start : start + found[start]] == found[start]).all() for start in starts)
        orders.append(tuple(found[starts]))
    assert orders[0] != orders[1]


def test_three_quarters_of_the_sequences_are_full_and_the_text_goes_on_from_one_to_the_next():
    text = document(np.arange(300_000))
    parts = long_text.mixed_lengths(text, 256, shortest=32, full=0.75, seed=0)
    lengths = np.array([len(part.ids) for part in parts])
    assert abs((lengths == 256).mean() - 0.75) < 0.048  # four standard deviations of 1,300 draws
    shorter = lengths[lengths < 256]
    assert shorter.min() >= 32 and abs(shorter.mean() - (32 + 255) / 2) < 15
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), text.ids[: lengths.sum()])
    assert len(text.ids) - lengths.sum() < 256
    assert {len(part.ids) for part in long_text.mixed_lengths(text, 256, shortest=256, full=1.0, seed=0)} == {256}


@pytest.mark.parametrize("spread", (True, False))
def test_a_pass_key_is_asked_for_at_the_end_and_stands_once_before(spread):
    lengths = [long_text.shortest_passkey(TOKENIZER), *(300,) * 40]
    found = long_text.passkeys(words(500), TOKENIZER, lengths, seed=0, spread=spread)
    assert [len(key.ids) for key in found] == lengths
    depths, numbers = [], set()
    for key in found:
        text = TOKENIZER.decode(key.ids.tolist())
        number, again = re.findall(r"The pass key is (\d{5})", text)
        assert number == again and text.endswith(f"\nWhat is the pass key? The pass key is {number}")
        assert TOKENIZER.decode(key.ids[key.loss_mask].tolist()) == number  # its answer alone is learned
        depths.append(text.index(number) / len(text))
        numbers.add(number)
    assert len(numbers) > 35
    steps = np.diff(depths[1:])
    assert (steps > 0).all() == spread and max(depths[1:]) - min(depths[1:]) > 0.5


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="leaves -1 for a text of 500"):
        long_text.passkeys(words(500), TOKENIZER, [long_text.shortest_passkey(TOKENIZER) - 1], seed=0)
    with pytest.raises(InputError, match="for a text of 20; expected"):
        long_text.passkeys(words(20), TOKENIZER, [300], seed=0)
    with pytest.raises(InputError, match="has 20 tokens; expected at least 64"):
        long_text.mixed_lengths(words(20), 64, shortest=8, full=1.0, seed=0)
    for full, shortest in ((1.5, 8), (0.5, 64), (0.5, 1)):
        with pytest.raises(InputError, match=f"a share of {full} in full and shortest {shortest} of 64"):
            long_text.mixed_lengths(words(200), 64, shortest=shortest, full=full, seed=0)
