"""Learning a vocabulary: the merges are those that the definition gives."""

import unicodedata
import warnings
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import splitting
from qwen_jax.tokenizer.alphabet import BYTE_ORDER
from tests.tokenizer.samples import SENTENCES


def learn_by_the_book(texts, size, min_frequency):
    """The definition, word for word: count all pairs of neighbours, merge the most frequent, begin again.

    Of equally frequent pairs, the one of lower ids is taken. Returns the tokens in order of their ids.
    """
    tokens = list(BYTE_ORDER)
    ids = {token: i for i, token in enumerate(tokens)}
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(splitting.QWEN, unicodedata.normalize("NFC", text)))
    pieces = [([ids[bytes([byte])] for byte in piece.encode()], count) for piece, count in counts.items()]
    while len(tokens) < size:
        pairs = Counter()
        for piece, count in pieces:
            for pair in zip(piece, piece[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < min_frequency:
            break
        for piece, _ in pieces:
            at = 0
            while at < len(piece) - 1:
                if (piece[at], piece[at + 1]) == best:
                    piece[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def learned(texts, size, min_frequency=2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer.train(texts, size, special_tokens=(), min_frequency=min_frequency)


@pytest.mark.parametrize("min_frequency", [1, 2, 5])
def test_the_merges_are_those_of_the_definition(min_frequency):
    texts = SENTENCES * 3
    assert list(learned(texts, 500, min_frequency).order) == learn_by_the_book(texts, 500, min_frequency)


@given(st.lists(st.text(alphabet="ab c1é猫\u0301", max_size=30), max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_merges_are_those_of_the_definition_on_random_text(texts):
    assert list(learned(texts, 290).order) == learn_by_the_book(texts, 290, 2)


def test_the_size_counts_control_tokens_which_come_last(tiny):
    tok = tokenizer.train(SENTENCES * 4, 400, special_tokens=["<|a|>", "<|b|>"])
    assert tok.vocab_size == 400 and tok.special_tokens == {"<|a|>": 398, "<|b|>": 399}


def test_a_vocabulary_that_stays_small_is_announced():
    with pytest.warns(UserWarning, match=r"the vocabulary has 261 tokens, not 1,000"):
        tok = tokenizer.train(["ab ab"] * 2, 1000)
    assert tok.vocab_size == 261


def test_texts_are_read_once_as_a_stream(tiny):
    assert tokenizer.train(iter(SENTENCES * 4), 600).order == tiny.order


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["a"], 258, "vocab_size is 258; it has to be an integer of at least 259"),
        (["a"], 300.5, "vocab_size is 300.5"),
        ("abc", 300, "texts is one string"),
        (["a", 7], 300, r"texts[1] is int"),
        (["a", "b", "\ud800"], 300, r"texts[2]: character 0 of the text is the lone surrogate"),
    ],
)
def test_bad_input_is_told_in_one_line(texts, size, message):
    with pytest.raises(InputError) as error:
        tokenizer.train(texts, size)
    assert message in str(error.value) and "\n" not in str(error.value)
