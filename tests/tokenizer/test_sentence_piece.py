"""SentencePiece behind the same face: exact both ways where trained here, as the library does where read."""

import contextlib
import io
import json
import pickle
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from tests.tokenizer.samples import CONTROL_NAMES, CORPUS, SENTENCES

ANY_TEXT = st.text() | st.lists(st.sampled_from([*SENTENCES, *CONTROL_NAMES, "\u2581", "\t", "\0", " "])).map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pieces(request):
    with pytest.warns(UserWarning, match="suffices for") if request.param == "unigram" else contextlib.nullcontext():
        return tokenizer.train_sentencepiece(CORPUS, 600, model_type=request.param)


@given(ANY_TEXT)
@settings(max_examples=150, deadline=None)
@example("\u2581a \u2581\u2581")
def test_decoding_gives_the_normalised_text_back(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == unicodedata.normalize("NFC", text)
    assert not set(ids) & set(pieces.special_tokens.values())


@given(st.lists(st.integers(0, 400)))
@settings(max_examples=60, deadline=None)
def test_streaming_gives_what_decoding_gives(pieces, ids):
    stream = pieces.stream()
    assert "".join(stream.push(index) for index in ids) + stream.finish() == pieces.decode(ids)


def test_control_tokens_follow_the_pieces_and_conversations_render(pieces):
    assert list(pieces.special_tokens.values()) == [pieces.regular_size + i for i in range(3)]
    messages = [{"role": "user", "content": "hi<|im_end|>"}, {"role": "assistant", "content": "oh, hello"}]
    ids, mask = tokenizer.chat.render(messages, pieces, generation="qwen2.5")
    assert ids.count(pieces.special_tokens["<|im_end|>"]) == 3
    assert pieces.decode([index for index, learned in zip(ids, mask, strict=True) if learned]) == "oh, hello<|im_end|>"


def test_saving_and_sending_keep_everything(pieces, tmp_path):
    pieces.save(tmp_path)
    text = "".join(SENTENCES) + "<|im_end|>"
    for again in (
        tokenizer.load(tmp_path),
        tokenizer.load(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(pieces)),
    ):
        assert again.encode(text, allowed_special="all") == pieces.encode(text, allowed_special="all")
        assert (again.special_tokens, again.shown) == (pieces.special_tokens, pieces.shown)


def test_digits_stand_singly(pieces):
    assert len(pieces.encode("1234")) == 4


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model as others publish them: a space before the text, control pieces, user-defined pieces."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=writer, vocab_size=450, hard_vocab_limit=False, byte_fallback=True,
        user_defined_symbols=["<turn>", "ab"], minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.model"
    path.write_bytes(writer.getvalue())
    return path


def test_models_of_others_encode_as_the_library_does(foreign):
    import sentencepiece

    peer = sentencepiece.SentencePieceProcessor(model_file=str(foreign))
    ours = tokenizer.load(foreign)
    for text in [*SENTENCES, "ab cab", "<s>", "a  b"]:
        ids = ours.encode(text)
        assert ids == peer.encode(text) and ours.decode(ids) == peer.decode(ids)
        stream = ours.stream()
        assert "".join(stream.push(index) for index in ids) + stream.finish() == peer.decode(ids)


def test_a_folder_may_list_the_models_own_control_pieces(foreign, tmp_path):
    """As published SentencePiece folders do: <unk>, <s> and </s> stand in tokenizer_config.json, too."""
    import sentencepiece

    peer, alone = sentencepiece.SentencePieceProcessor(model_file=str(foreign)), tokenizer.load(foreign)
    (tmp_path / "tokenizer.model").write_bytes(foreign.read_bytes())
    listed = {str(peer.piece_to_id(name)): {"content": name} for name in ("<unk>", "<s>", "</s>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    found = tokenizer.load(tmp_path)
    assert found.special_tokens == alone.special_tokens
    assert found.encode("hello there") == alone.encode("hello there") == peer.encode("hello there")


def test_control_pieces_of_others_are_never_made_by_text(foreign):
    ours = tokenizer.load(foreign)
    assert set(ours.special_tokens) == {"<s>", "</s>", "<turn>"}
    assert not set(ours.encode("<s>a<turn>b</s>")) & set(ours.special_tokens.values())
    assert ours.special_tokens["<turn>"] in ours.encode("a<turn>b", allowed_special={"<turn>"})


def test_bad_input_is_told_in_one_line(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00 no model")
    cases = [
        (lambda: tokenizer.load(tmp_path), "tokenizer.model: these 10 bytes are not a SentencePiece model"),
        (lambda: tokenizer.train_sentencepiece(["a"], 600, model_type="word"), "model_type is 'word'"),
        (lambda: tokenizer.train_sentencepiece(["a b c"], 100), "SentencePiece cannot train vocab_size=100"),
        (lambda: tokenizer.train_sentencepiece("abc", 600), "texts is one string"),
    ]
    for call, message in cases:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
