"""The published Qwen vocabularies: all routes give identical ids, and the ids that are published."""

import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.tokenizer import merges
from tests.tokenizer import downloads
from tests.tokenizer.samples import CONTROL_NAMES, SENTENCES
from tests.tokenizer.test_files import write_vocabulary_and_merges

ANY_TEXT = st.text() | st.lists(st.text(max_size=4) | st.sampled_from([*SENTENCES, *CONTROL_NAMES])).map("".join)


@pytest.fixture(scope="module")
def qwen():
    return tokenizer.load(downloads.qwen_tiktoken())


@pytest.fixture(scope="module")
def qwen3():
    return tokenizer.load(downloads.qwen3_folder())


@pytest.fixture(scope="module")
def peer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(downloads.qwen3_folder() / "tokenizer.json"))


@pytest.fixture(scope="module")
def plain_peer():
    """The peer with no control tokens at all: `tokenizers` cannot spell out those that are not flagged special."""
    from tokenizers import Tokenizer

    document = json.loads((downloads.qwen3_folder() / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(document | {"added_tokens": []}))


def test_sizes(qwen, qwen3):
    assert (qwen.regular_size, qwen.vocab_size) == (151_643, 151_851)
    assert (qwen3.regular_size, qwen3.vocab_size) == (151_643, 151_669)


def test_tables_are_those_of_the_published_files(qwen3):
    assert tuple(qwen3.special_tokens) == tokenizer.controls.table("qwen3")
    assert qwen3.shown == tokenizer.controls.SHOWN


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9707, 1879]),
        (" Hello world", [21927, 1879]),
        ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
        ("system", [8948]),
        ("user", [872]),
        ("assistant", [77091]),
        ("\n", [198]),
        ("You are a helpful assistant.", [2610, 525, 264, 10950, 17847, 13]),
        (" 根", [51461, 117]),
    ],
)
def test_published_ids(qwen, qwen3, text, ids):
    assert qwen.encode(text) == qwen3.encode(text) == ids
    assert qwen.decode(ids) == text


def test_published_ids_of_control_tokens(qwen):
    text = 'print("<|endoftext|>")'
    assert qwen.encode(text, allowed_special="all") == [1350, 445, 151643, 899]
    text = 'print("<|extra_0|>")<|endoftext|>'
    expected = [1350, 9639, 91, 15460, 62, 15, 91, 82598, 151643]
    assert qwen.encode(text, allowed_special={"<|endoftext|>"}) == expected


def test_all_routes_are_one_vocabulary(qwen, qwen3, tmp_path):
    """Equal tokens, ids and priorities leave no text on which two routes could differ."""
    folder = write_vocabulary_and_merges(qwen, tmp_path)
    pairs = tokenizer.load(folder, generation="qwen2.5")
    qwen.save(tmp_path / "saved")
    saved = tokenizer.load(tmp_path / "saved")
    for route in (qwen3, pairs, saved):
        assert route.vocabulary == qwen.vocabulary and route.order == qwen.order
        assert (route.pattern, route.nfc) == (qwen.pattern, qwen.nfc)
    assert saved.special_tokens == qwen.special_tokens
    assert pairs.special_tokens == {name: 151_643 + i for i, name in enumerate(tokenizer.controls.table("qwen2.5"))}


def test_merges_found_from_ranks_are_the_published_ones(qwen):
    model = json.loads((downloads.qwen3_folder() / "tokenizer.json").read_text())["model"]
    found = [[tokenizer.alphabet.to_text(half) for half in pair] for pair in merges.find(qwen.order)]
    assert found == model["merges"]


@given(text=ANY_TEXT)
@settings(max_examples=500, deadline=None)
def test_any_text_encodes_as_with_the_tokenizers_library(qwen, qwen3, peer, plain_peer, text):
    ids = plain_peer.encode(text).ids
    assert qwen.encode(text) == qwen3.encode(text) == ids
    assert qwen3.encode(text, allowed_special="all") == peer.encode(text).ids
    assert qwen3.decode(ids) == unicodedata.normalize("NFC", text)


def test_random_characters_of_all_planes_encode_as_with_the_tokenizers_library(qwen, plain_peer):
    """Characters that Python's Unicode tables know; the library's are older, and may order rare marks otherwise."""
    draw = random.Random(0)
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    for _ in range(300):
        text = "".join(draw.choices(known, k=200))
        assert qwen.encode(text) == plain_peer.encode(text).ids


def test_the_saved_file_means_the_same_to_the_tokenizers_library(qwen, tmp_path):
    from tokenizers import Tokenizer

    qwen.save(tmp_path)
    text = "".join(SENTENCES) + "<|extra_7|>"
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert ids == qwen.encode(text, allowed_special="all")
