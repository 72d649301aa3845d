"""Vocabulary files: every published form is read exactly, and what is written reads back the same."""

import base64
import json
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import merges, splitting
from qwen_jax.tokenizer.alphabet import BYTE_ORDER, to_bytes, to_text
from tests.tokenizer.samples import CONTROL_NAMES, SENTENCES

TEXT = "".join(SENTENCES)


def write_ranks(tok, path):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in tok.vocabulary.items()))
    return path


def write_vocabulary_and_merges(tok, folder, controls=None):
    (folder / "vocab.json").write_text(json.dumps({to_text(token): i for token, i in tok.vocabulary.items()}))
    lines = [f"{to_text(left)} {to_text(right)}" for left, right in merges.find(tok.order)]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if controls:
        listed = {str(i): {"content": name, "special": True} for name, i in controls.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return folder


def test_the_alphabet_spells_every_byte():
    assert to_text(bytes(range(256))) == "".join(map(to_text, BYTE_ORDER[188:221])) + "".join(
        to_text(bytes([byte])) for byte in range(33, 256)
    )
    assert to_bytes(to_text(bytes(range(256)))) == bytes(range(256))
    assert (to_text(b" \n"), to_text(b"!")) == ("ĠĊ", "!")
    with pytest.raises(ValueError, match="outside"):
        to_bytes("a b")


def test_all_routes_give_the_same_ids(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    folder = write_vocabulary_and_merges(tiny, tmp_path, tiny.special_tokens)
    routes = {
        "folder": tokenizer.load(tmp_path / "saved"),
        "tokenizer.json": tokenizer.load(str(tmp_path / "saved" / "tokenizer.json")),
        "ranks": tokenizer.load(write_ranks(tiny, tmp_path / "x.tiktoken"), generation="qwen2"),
        "vocab.json and merges.txt": tokenizer.load(folder),
    }
    for name, route in routes.items():
        assert route.encode(TEXT) == tiny.encode(TEXT), name
        assert route.special_tokens == tiny.special_tokens, name
        assert route.encode("a<|im_end|>", allowed_special="all") == tiny.encode("a<|im_end|>", allowed_special="all")


def test_saving_and_loading_keeps_everything(tiny3, tmp_path):
    tiny3.save(tmp_path)
    again = tokenizer.load(tmp_path)
    for name in ("vocabulary", "order", "special_tokens", "shown", "pattern", "nfc", "vocab_size"):
        assert getattr(again, name) == getattr(tiny3, name), name
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_chat_template_is_carried_along(tiny, tmp_path):
    tiny.save(tmp_path / "a", chat_template="{{ a }}")
    tok = tokenizer.load(tmp_path / "a")
    assert tok.chat_template == "{{ a }}" and tiny.chat_template is None
    tok.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "{{ a }}"
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ b }}")
    assert tokenizer.load(tmp_path / "b").chat_template == "{{ b }}"


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.train(["ab" * 9] * 9, 259).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def peer(tiny, tmp_path_factory):
    """The saved file as the `tokenizers` library reads it."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("peer")
    tiny.save(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(st.text() | st.lists(st.sampled_from([*SENTENCES, *CONTROL_NAMES, "  ", "\n\n"])).map("".join))
@settings(max_examples=200, deadline=None)
def test_the_saved_file_means_the_same_to_the_tokenizers_library(tiny, peer, text):
    peer.encode_special_tokens = False
    ids = peer.encode(text).ids
    assert tiny.encode(text, allowed_special="all") == ids
    assert tiny.decode(ids) == peer.decode(ids, skip_special_tokens=False)
    assert tiny.decode(ids, skip_special=True) == peer.decode(ids, skip_special_tokens=True)
    peer.encode_special_tokens = True
    assert tiny.encode(text) == peer.encode(text).ids


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=12), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:the text has too few pairs")
def test_merges_found_from_ranks_are_those_that_made_them(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    machine = Tokenizer(models.BPE())
    machine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    machine.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(machine.to_str())["model"]
    order = [text.encode() for text in sorted(model["vocab"], key=model["vocab"].get)]
    pairs = [tuple(half.encode() for half in pair) for pair in model["merges"]]
    assert merges.find(order) == pairs
    assert merges.check(pairs, order) is None


def test_merges_that_ranks_would_not_follow_are_found():
    """In "abc", b and c are joined first, so that the pair ab + c never meets."""
    order = [b"a", b"b", b"c", b"bc", b"ab", b"abc"]
    assert merges.check([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], order) == 2
    assert merges.check([(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")], order) is None
    assert merges.find(order)[-1] == (b"a", b"bc")


def published_toy(folder):
    """The toy vocabulary of transformers' Qwen2 tests: four tokens that no merge makes, ids unlike ranks."""
    words = ["Ġl", "Ġn", "Ġlo", "Ġlow", "er", "Ġlowest", "Ġnewer", "Ġwider", "01", ";}", ";}Ċ", "Ïĵ", "Ġ#", "##"]
    spelt = [*map(to_text, BYTE_ORDER), *words, "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(spelt)}))
    pairs = ["Ġ l", "Ġl o", "Ġlo w", "e r", "0 1", "; }", ";} Ċ", "Ï ĵ", "Ġ #", "# #"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs), encoding="utf-8")
    return tokenizer.load(folder)


def test_the_published_toy_vocabulary_gives_the_published_ids(tmp_path):
    tok = published_toy(tmp_path)
    text = "lower lower newer 010;}\n<|endoftext|>\u03d2\u0301"
    ids = [75, 78, 86, 260, 259, 260, 220, 77, 68, 86, 260, 220, 15, 16, 15, 266, 270, 267]
    assert tok.encode(text, allowed_special={"<|endoftext|>"}) == ids
    assert tok.encode(" ###") == [268, 269]
    assert tok.special_tokens == {"<|endoftext|>": 270, "<|im_start|>": 271, "<|im_end|>": 272}
    marks = "\u03d2\u0301\u03d2\u0308\u017f\u0307"
    assert tok.decode(tok.encode(marks)) == "\u03d3\u03d4\u1e9b" == unicodedata.normalize("NFC", marks)
    assert tok.decode([261, 262, 263]) == " lowest newer wider"
    tok.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").encode(text, allowed_special="all") == ids


def test_ids_need_not_rise_with_the_priority_of_merges(tiny, tmp_path):
    from tokenizers import Tokenizer

    tiny.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = {text: tiny.regular_size - 1 - i for text, i in document["model"]["vocab"].items()}
    path.write_text(json.dumps(document))
    tok = tokenizer.load(path)
    assert tok.encode(TEXT) == Tokenizer.from_file(str(path)).encode(TEXT).ids != tiny.encode(TEXT)
    assert tok.decode(tok.encode(TEXT)) == tiny.decode(tiny.encode(TEXT))
    tok.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").encode(TEXT) == tok.encode(TEXT)
    more = tokenizer.extend(tok, {"Quagga": 2})
    assert more.encode("Quagga" + TEXT) == [more.vocabulary[b"Quagga"], *tok.encode(TEXT)]


@pytest.mark.parametrize("digits", [True, False])
def test_older_pre_tokenizers_are_read_exactly(tiny, tmp_path, digits):
    """ByteLevel's own cut, alone and behind Digits (SmolLM2), with control tokens before the regular ones."""
    from tokenizers import Tokenizer

    tiny.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    steps = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    steps = [{"type": "Digits", "individual_digits": True}, *steps] if digits else steps
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    document["normalizer"] = None
    document["model"]["vocab"] = {text: i + 3 for text, i in document["model"]["vocab"].items()}
    document["added_tokens"] = [token | {"id": i} for i, token in enumerate(document["added_tokens"])]
    document["model"]["vocab"] |= {token["content"]: token["id"] for token in document["added_tokens"]}
    path.write_text(json.dumps(document))
    ours, peer = tokenizer.load(path), Tokenizer.from_file(str(path))
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    text = TEXT + "a  12 x 3\n 4 \t5   "
    assert ours.encode(text) == peer.encode(text).ids
    ours.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again").encode(text) == ours.encode(text)
    assert Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json")).encode(text).ids == ours.encode(text)


@pytest.mark.parametrize("steps", [["Digits", "ByteLevel"], ["ByteLevel"], ["Split", "ByteLevel"]], ids="+".join)
@given(text=st.text(alphabet=" \n\r\t\u30001²½aS'!é猫\u0301"))
@settings(max_examples=150, deadline=None)
def test_pieces_are_those_of_the_tokenizers_library(steps, text):
    from tokenizers import Regex, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="Split" not in steps)
    before = {"Digits": pre_tokenizers.Digits(True), "Split": pre_tokenizers.Split(Regex(splitting.QWEN), "isolated")}
    peer = pre_tokenizers.Sequence([*(before[step] for step in steps[:-1]), level])
    pattern = {"Digits": splitting.GPT2_DIGITS, "ByteLevel": splitting.GPT2, "Split": splitting.QWEN}[steps[0]]
    expected = [to_bytes(piece).decode() for piece, _ in peer.pre_tokenize_str(text)]
    assert regex.findall(pattern, text) == expected


def test_a_vocabulary_may_lack_bytes_that_no_text_of_its_had(tiny, tmp_path):
    """As SmolLM2's does; such a text is refused, where others would drop the character."""
    tiny.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    del document["model"]["vocab"][to_text(b"\x04")]
    path.write_text(json.dumps(document))
    tok = tokenizer.load(path)
    assert tok.encode(TEXT) == tiny.encode(TEXT)
    with pytest.raises(InputError, match=r"the text has '\\x04' \(U\+0004\), whose bytes the vocabulary lacks"):
        tok.encode("a\x04b")
    with pytest.raises(InputError, match=r"the text has '\\x04'"):
        tokenizer.extend(tok, ["a\x04b"] * 3)


def test_control_tokens_that_end_as_another_begins_are_refused(tiny):
    with pytest.raises(InputError, match="'<a><b' and '<b><c' overlap: one ends as the other begins"):
        tokenizer.ByteBPE(tiny.vocabulary, {"<b><c": tiny.regular_size, "<a><b": tiny.regular_size + 1})


def test_a_control_token_spelled_like_a_regular_one_is_refused(tiny):
    with pytest.raises(InputError, match="the control token 'a' is spelled like the regular token 'a'"):
        tokenizer.ByteBPE(tiny.vocabulary, {"a": tiny.regular_size})


def test_a_refused_save_writes_nothing(tiny, tmp_path):
    unreachable = tokenizer.ByteBPE({**tiny.vocabulary, b"zzqqxxyyww": 9999}, {})
    with pytest.raises(InputError):
        unreachable.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_extra_tokens_beside_qwen_tiktoken_follow_its_control_tokens(tiny, tmp_path):
    path = write_ranks(tiny, tmp_path / "qwen.tiktoken")
    size = tiny.regular_size + 208
    lines = [("lower sun", size), ("zz", size + 1), ("ab", 3), ("the", size + 2)]
    (tmp_path / "qwen_extra.tiktoken").write_bytes(
        b"".join(base64.b64encode(text.encode()) + b" %d\n" % i for text, i in lines)
    )
    tok = tokenizer.load(path)
    assert tok.encode("zz") == [size + 1] and tok.vocabulary.get(b"ab") == tiny.vocabulary.get(b"ab")
    assert tok.special_tokens["<|extra_204|>"] == size - 1


def broken(tiny, folder, what):
    """Writes a malformed file and returns its path."""
    if what.startswith("ranks"):
        path = write_ranks(tiny, folder / "x.tiktoken")
        lines = path.read_bytes().splitlines()
        lines[4] = {
            "ranks: no base64": b"%% 4",
            "ranks: no rank": b"IQ==",
            "ranks: twice": lines[3],
            "ranks: same rank": lines[4].split()[0] + b" 3",
        }.get(what, b"")
        path.write_bytes(b"\n".join(lines))
        return path
    if what.startswith("merges"):
        write_vocabulary_and_merges(tiny, folder)
        with open(folder / "merges.txt", "a", encoding="utf-8") as file:
            file.write({"merges: not in vocabulary": "zz q\n", "merges: one": "zz\n"}.get(what, "Ġ t\n"))
        if what == "merges: missing":
            (folder / "merges.txt").unlink()
        return folder
    tiny.save(folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    match what:
        case "json: syntax":
            path.write_text('{\n"model":\n')
            return path
        case "json: other":
            document = {"a": 1}
        case "json: twice":
            document["added_tokens"][1]["content"] = "<|endoftext|>"
        case "json: same id":
            document["added_tokens"][1]["id"] = 5
        case "json: strips":
            document["added_tokens"][1]["lstrip"] = True
        case "json: normalizer":
            document["normalizer"] = {"type": "Lowercase"}
        case "json: pre_tokenizer":
            document["pre_tokenizer"] = {"type": "Whitespace"}
        case "json: number for a list":
            document["model"]["merges"] = None
        case "json: text for an object":
            document["normalizer"] = "NFC"
        case "json: other merging":
            document["model"]["ignore_merges"] = True
        case "json: no byte":
            del document["model"]["vocab"]["!"]
            document["model"]["merges"] = []
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ranks: no base64", "x.tiktoken, line 5: found b'%% 4'; a line is `base64 rank`"),
        ("ranks: no rank", "x.tiktoken, line 5: found b'IQ=='"),
        ("ranks: twice", "x.tiktoken, line 5: token b'$' is empty, listed before"),
        ("ranks: same rank", "x.tiktoken, line 5: rank 3 stands in line 4 already"),
        ("ranks: hole", "x.tiktoken: ranks have to be 0..595, each once"),
        ("merges: not in vocabulary", "merges.txt, line 343: 'zz q' does not fit: 'zz' is not in the vocabulary"),
        ("merges: one", "merges.txt, line 343: found 'zz'; a merge is two tokens"),
        ("merges: repeated", "merges.txt, line 343: 'Ġ t' does not fit: an earlier merge makes this token"),
        ("merges: missing", "merges.txt: missing beside vocab.json"),
        ("json: syntax", "tokenizer.json: not valid JSON: line 3"),
        ("json: other", "tokenizer.json: no model.vocab and model.merges"),
        ("json: twice", "added token 1: special token '<|endoftext|>' is listed twice"),
        ("json: same id", "id 5 is given to both b'&' and '<|im_start|>'"),
        ("json: strips", "added token 1: '<|im_start|>' has lstrip set"),
        ("json: normalizer", "tokenizer.json: normalizer is 'Lowercase'; readable are NFC and none"),
        ("json: pre_tokenizer", "tokenizer.json: pre_tokenizer is"),
        ("json: number for a list", "tokenizer.json: malformed"),
        ("json: text for an object", "tokenizer.json: malformed"),
        ("json: other merging", "model.ignore_merges is True; only its absence is supported"),
        ("json: no byte", "tokenizer.json: the vocabulary lacks the byte b'!' and 0 other"),
    ],
)
def test_malformed_files_are_told_in_one_line(tiny, tmp_path, what, message):
    path = broken(tiny, tmp_path, what)
    with pytest.raises(InputError) as error:
        tokenizer.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_wrong_generations_are_told(tiny, tmp_path):
    with pytest.raises(InputError, match="no such tokenizer file or folder"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no tokenizer in this folder; looked for tokenizer.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="generation 'qwen4' is not known; it is one of qwen, qwen1.5"):
        tokenizer.load(write_ranks(tiny, tmp_path / "x.tiktoken"), generation="qwen4")
    tiny.save(tmp_path)
    with pytest.raises(InputError, match="lists its own control tokens"):
        tokenizer.load(tmp_path, generation="qwen3")
