"""Continuing a vocabulary keeps what it has and learns, on top, what the definition gives."""

import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from qwen_jax.tokenizer.alphabet import BYTE_ORDER
from tests.tokenizer import downloads
from tests.tokenizer.samples import SENTENCES
from tests.tokenizer.test_learning import learned


def test_learning_in_two_steps_is_learning_in_one():
    texts = SENTENCES * 3
    whole = learned(texts, 500)
    half = learned(texts, 350)
    assert tokenizer.extend(half, texts, 500).order == whole.order


@given(st.lists(st.text(alphabet="ab c1é猫\u0301", max_size=30), max_size=6), st.integers(256, 275))
@settings(max_examples=60, deadline=None)
def test_learning_in_two_steps_is_learning_in_one_on_random_text(texts, size):
    whole, half = learned(texts, 290), learned(texts, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokenizer.extend(half, texts, 290).order[: len(whole.order)] == whole.order


def test_new_ids_follow_all_others_and_survive_saving(tiny, tmp_path):
    from tokenizers import Tokenizer

    more = tokenizer.extend(tiny, {" Quagga": 9, " Quaggas": 4, "the": 99})
    assert more.special_tokens == tiny.special_tokens
    assert {token: more.vocabulary[token] for token in tiny.vocabulary} == tiny.vocabulary
    new = sorted(more.vocabulary.values())[tiny.regular_size :]
    assert new == list(range(tiny.vocab_size, more.vocab_size))
    assert more.encode(" Quagga") == [more.vocabulary[b" Quagga"]]
    text = "".join(SENTENCES) + " Quaggas<|im_end|>"
    more.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.encode(text, allowed_special="all") == more.encode(text, allowed_special="all")
    peer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.encode(text).ids == more.encode(text, allowed_special="all")


WORKED = {"我是一只猫": 20, "你是一只猫": 10, "他是一只猫": 5, "一只": 200, "一只猫": 100}


LEARNED = ["一只猫", "只猫", "是一只猫", "我是一只猫", "你是一只猫", "他是一只猫"]


def test_the_published_worked_example_on_a_small_vocabulary():
    """qwen_spec.md 1.5: 只猫 is learned because 是一 is a token already and comes before 一只."""
    order = list(BYTE_ORDER)
    for character in "我你他是一只猫":
        order += [prefix for prefix in (character.encode()[:2], character.encode()) if prefix not in order]
    order += ["是一".encode(), "一只".encode()]
    small = tokenizer.ByteBPE({token: i for i, token in enumerate(order)}, {"<|endoftext|>": len(order)})
    more = tokenizer.extend(small, WORKED)
    assert [token.decode() for token in more.order[len(order) :]] == LEARNED
    assert more.vocabulary["一只猫".encode()] == len(order) + 1


def test_the_published_worked_example():
    qwen = tokenizer.load(downloads.qwen_tiktoken())
    more = tokenizer.extend(qwen, WORKED)
    new = {i: token.decode() for token, i in more.vocabulary.items() if i >= qwen.vocab_size}
    assert new == dict(enumerate(LEARNED, 151_851))
    assert tokenizer.extend(qwen, Counter(WORKED), 151_853).vocab_size == 151_853
    assert len(more.encode("我是一只猫")) == 1


def test_a_chat_template_is_carried_along(tiny):
    try:
        tiny.chat_template = "{{ messages }}"
        assert tokenizer.extend(tiny, ["abab"] * 3).chat_template == "{{ messages }}"
    finally:
        tiny.chat_template = None


def test_the_smaller_size_is_announced(tiny):
    with pytest.warns(UserWarning, match=r"the vocabulary has 60\d tokens, not 900"):
        tokenizer.extend(tiny, {"Quagga": 2}, 900)


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        ({"two words": 3}, None, "word 'two words' is cut into ['two', ' words']"),
        ({"a": 0}, None, "word 'a': its count is 0"),
        ({"": 3}, None, "word '' is cut into []"),
        ({7: 3}, None, "texts[0] is int"),
        (["abc"], 600, "vocab_size is 600; the vocabulary to continue has 600 tokens already"),
    ],
)
def test_bad_input_is_told_in_one_line(tiny, words, size, message):
    with pytest.raises(InputError) as error:
        tokenizer.extend(tiny, words, size)
    assert message in str(error.value) and "\n" not in str(error.value)
