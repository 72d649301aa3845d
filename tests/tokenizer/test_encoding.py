"""Text to ids and back: exact on every text, whatever it says."""

import pickle
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import byte_bpe, splitting
from tests.tokenizer.samples import CONTROL_NAMES, SENTENCES

ANY_TEXT = st.text() | st.lists(st.sampled_from([*SENTENCES, *CONTROL_NAMES, " ", "\n", "e\u0301", "1"])).map("".join)


def encode_by_the_book(tok, text):
    """Byte-pair encoding as textbooks give it: while two neighbours make a token, join the pair of lowest rank."""
    ranks = {token: rank for rank, token in enumerate(tok.order)}
    ids = []
    for piece in regex.findall(splitting.QWEN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not joined:
                break
            _, i = min(joined)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [tok.vocabulary[part] for part in parts]
    return ids


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
@example("".join(SENTENCES))
def test_encoding_is_byte_pair_encoding(tiny, text):
    assert tiny.encode(text) == encode_by_the_book(tiny, text)


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_decoding_gives_the_normalised_text_back(tiny, text):
    assert tiny.decode(tiny.encode(text)) == unicodedata.normalize("NFC", text)


@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_no_text_becomes_a_control_token(tiny3, text):
    assert max(tiny3.encode(text), default=0) < tiny3.regular_size


@given(st.lists(st.integers(0, 599)), st.booleans())
@settings(max_examples=200, deadline=None)
@example([*"猫".encode()[:2]], False)
def test_streaming_gives_what_decoding_gives(tiny, ids, skip_special):
    stream = tiny.stream(skip_special=skip_special)
    text = "".join(stream.push(index) for index in ids) + stream.finish()
    assert text == tiny.decode(ids, skip_special=skip_special)


def test_streaming_holds_back_half_a_character(tiny):
    ids = [tiny.vocabulary[bytes([byte])] for byte in "a😀b".encode()]
    stream = tiny.stream()
    assert [stream.push(index) for index in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.push(ids[1:3]) == "" and stream.finish() == "\ufffd"
    assert stream.push(ids[-1]) == "b"


def test_digits_stand_singly():
    tok = tokenizer.train(["2024 2024"] * 9, 256, special_tokens=())
    assert tok.encode("2024") == [tok.vocabulary[digit] for digit in (b"2", b"0", b"2", b"4")]
    with pytest.warns(UserWarning, match="has 256 tokens"):
        assert len(tokenizer.train(["20242024"] * 9, 300, special_tokens=()).encode("2024")) == 4


def test_named_control_tokens_are_encoded_and_no_others(tiny):
    text = "a<|im_start|>b<|im_end|>"
    start, end = tiny.special_tokens["<|im_start|>"], tiny.special_tokens["<|im_end|>"]
    ids = tiny.encode(text, allowed_special={"<|im_start|>"})
    assert ids == [*tiny.encode("a"), start, *tiny.encode("b<|im_end|>")] and end not in ids
    assert tiny.encode(text, allowed_special="all") == [*tiny.encode("a"), start, *tiny.encode("b"), end]
    assert tiny.decode(tiny.encode(text, allowed_special="all")) == text
    assert tiny.decode(tiny.encode(text, allowed_special="all"), skip_special=True) == "ab"


def test_skipping_keeps_the_control_tokens_that_structure_an_answer(tiny3):
    ids = tiny3.encode("<|im_start|><think>x</think><|im_end|>", allowed_special="all")
    assert tiny3.decode(ids, skip_special=True) == "<think>x</think>"


def test_batches_encode_like_single_texts(tiny):
    texts = [sentence * n for n in range(5) for sentence in SENTENCES]
    assert tiny.encode_batch(texts) == [tiny.encode(text) for text in texts]
    assert tiny.encode_batch([], threads=2) == []


def test_arrays_decode_like_lists(tiny):
    ids = tiny.encode("hello there")
    assert tiny.decode(np.array(ids, np.int32)) == tiny.decode(tuple(ids)) == "hello there"


def test_a_copy_for_a_worker_encodes_alike(tiny):
    text = "".join(SENTENCES)
    assert pickle.loads(pickle.dumps(tiny)).encode(text) == tiny.encode(text)


@pytest.mark.parametrize("run", ["\n", " ", "\t ", "\u3000"])
def test_a_million_white_space_characters_encode_exactly(tiny, run, monkeypatch):
    """tiktoken alone aborts on them."""
    text = "x!\n" + run * (1_000_000 // len(run)) + "x  y"
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    monkeypatch.setattr(byte_bpe, "_LONG_RUN", 40)
    short = "x!\n" + run * 50 + "x  y"
    careful = tiny.encode(short)
    monkeypatch.undo()
    assert careful == tiny.encode(short)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tok: tok.encode("ab\ud800c"), "character 2 of the text is the lone surrogate U+D800"),
        (lambda tok: tok.encode(b"ab"), "the text is bytes"),
        (lambda tok: tok.encode("a", allowed_special={"<|im_begin|>"}), "names '<|im_begin|>', which is not a control"),
        (lambda tok: tok.encode("a", allowed_special="<|im_end|>"), "allowed_special is '<|im_end|>'"),
        (lambda tok: tok.encode_batch(["a", "\udfff"]), r"texts[1]: character 0"),
        (lambda tok: tok.encode_batch("abc"), "was given one text"),
        (lambda tok: tok.decode([1, 600]), r"ids[1] is 600, which is not in the vocabulary of 600 tokens"),
        (lambda tok: tok.decode([-1]), r"ids[0] is -1"),
        (lambda tok: tok.decode([1.5]), r"ids[0] is 1.5, which is not an integer"),
    ],
)
def test_bad_input_is_told_in_one_line(tiny, call, message):
    with pytest.raises(InputError) as error:
        call(tiny)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sizes_are_not_confused(tiny):
    assert (tiny.regular_size, tiny.vocab_size) == (597, 600)
    assert list(tiny.special_tokens.values()) == [597, 598, 599]


@pytest.mark.parametrize(
    ("generation", "count"), [("qwen", 208), ("qwen1.5", 3), ("qwen2", 3), ("qwen2.5", 22), ("qwen3", 26)]
)
def test_control_tables_have_the_published_sizes_and_ids(generation, count):
    table = tokenizer.controls.table(generation)
    ids = {name: 151_643 + i for i, name in enumerate(table)}
    assert len(table) == count == len(set(table))
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    published |= {"<|extra_0|>": 151646, "<|extra_204|>": 151850} if generation == "qwen" else {}
    if generation in ("qwen2.5", "qwen3"):
        published |= {"<|object_ref_start|>": 151646, "<|vision_start|>": 151652, "<|video_pad|>": 151656}
        published |= {"<tool_call>": 151657, "</tool_call>": 151658, "<|fim_pad|>": 151662, "<|file_sep|>": 151664}
    published |= {"<tool_response>": 151665, "</think>": 151668} if generation == "qwen3" else {}
    assert {name: ids[name] for name in published} == published


@pytest.mark.parametrize("names", [["<a>", "<a>"], ["<a>", "x<a>"], ["", "<a>"], [7]])
def test_ambiguous_control_tokens_are_refused(names):
    with pytest.raises(InputError, match="special token"):
        tokenizer.train(["abc"], 300, special_tokens=names)
