"""The command line: what it prints is what the library gives, and bad input is one line and status 2."""

import io
import json
import subprocess
import sys

import pytest

from qwen_jax import tokenizer
from qwen_jax.tokenizer import __main__ as command
from qwen_jax.tokenizer import report
from tests.tokenizer.samples import CORPUS, SENTENCES


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.save(folder)
    return str(folder)


def run(capsys, *arguments):
    assert command.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_train_saves_what_the_library_learns(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("".join(SENTENCES), encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in CORPUS))
    out = tmp_path / "out"
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    printed = run(capsys, "train", *files, "--out", str(out), "--vocab-size", "500")
    assert printed == f"{out}: 497 regular and 3 control tokens\n"
    assert tokenizer.load(out).order == tokenizer.train(["".join(SENTENCES), *CORPUS], 500).order


def test_encode_and_decode_are_those_of_the_library(capsys, tiny, folder, tmp_path, monkeypatch):
    text = "".join(SENTENCES) + "<|im_end|>"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    ids = run(capsys, "encode", folder, "--file", str(tmp_path / "a.txt"))
    assert ids.split() == [str(index) for index in tiny.encode(text)]
    assert run(capsys, "encode", folder, "--text", text) == ids
    allowed = run(capsys, "encode", folder, "--text", text, "--allow-special", "<|im_end|>")
    assert allowed.split()[-1] == str(tiny.special_tokens["<|im_end|>"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(allowed))
    assert run(capsys, "decode", folder, "--skip-special") == tiny.decode(tiny.encode("".join(SENTENCES)))
    assert run(capsys, "decode", folder, "0", "1") == tiny.decode([0, 1])


def test_report_counts_bytes_and_tokens(capsys, tiny, folder, tmp_path):
    bytes_only = tokenizer.train([], 256, special_tokens=())
    bytes_only.save(tmp_path / "bytes")
    (tmp_path / "zh.txt").write_text(SENTENCES[2], encoding="utf-8", newline="")
    (tmp_path / "en.txt").write_text(SENTENCES[0], encoding="utf-8", newline="")
    texts = [f"chinese={tmp_path / 'zh.txt'}", str(tmp_path / "en.txt")]
    out = tmp_path / "report"
    printed = run(capsys, "report", folder, *texts, "--against", str(tmp_path / "bytes"), "--out", str(out))
    rows = json.loads((out / "report.json").read_text())["fits"]
    assert [(row["text"], row["bytes"], row["tokens"]) for row in rows] == [
        ("chinese", len(SENTENCES[2].encode()), len(tiny.encode(SENTENCES[2]))),
        ("chinese", len(SENTENCES[2].encode()), len(SENTENCES[2].encode())),
        ("en", len(SENTENCES[0]), len(tiny.encode(SENTENCES[0]))),
        ("en", len(SENTENCES[0]), len(SENTENCES[0])),
    ]
    assert "| bytes: bytes/token |" in printed and (out / "report.md").read_text() in printed
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report.Fit("a", "b", bytes=30, tokens=4).bytes_per_token == 7.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "nowhere", "--text", "a"], "nowhere: no such tokenizer file or folder"),
        (["encode", "{folder}", "--file", "nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
        (["encode", "{folder}", "--file", "{broken}"], "broken.txt: not UTF-8: byte 0xFF at offset 3"),
        (["decode", "{folder}", "9999"], "ids[0] is 9999"),
        (["train", "nowhere.txt", "--out", "{out}", "--vocab-size", "300"], "nowhere.txt: cannot be read"),
        (["train", "{jsonl}", "--out", "{out}", "--vocab-size", "300"], "a.jsonl, line 2: has no text in field 'text'"),
        (["train", "--out", "{out}", "--vocab-size", "300"], "no file named"),
        (["report", "{folder}", "{empty}", "--against", "{folder}", "--out", "{out}"], "text 'empty' is empty"),
        (["encode", "{folder}", "--text", "a", "--file", "{empty}"], "--text and --file are two ways"),
        (["train", "{jsonl}", "--out", "{empty}", "--vocab-size", "300"], "empty.txt is a file; expected a folder"),
        (
            ["report", "{folder}", "en={empty}", "en={broken}", "--against", "{folder}", "--out", "{out}"],
            "two texts are called 'en'",
        ),
        (["report", "{folder}", "--against", "{folder}", "--out", "{out}"], "no text named"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, folder, tmp_path, arguments, message):
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    paths = {name: tmp_path / f"{name}.txt" for name in ("broken", "empty")}
    paths |= {"folder": folder, "out": tmp_path / "out", "jsonl": tmp_path / "a.jsonl"}
    assert command.main([argument.format(**paths) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_importing_the_package_loads_no_heavy_library():
    heavy = "{'jax', 'tensorflow', 'torch', 'tokenizers', 'tiktoken', 'sentencepiece', 'matplotlib', 'transformers'}"
    code = f"import sys, qwen_jax.tokenizer; sys.exit(str({heavy} & set(sys.modules) or '') or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_runs_as_a_module(folder):
    command_line = [sys.executable, "-m", "qwen_jax.tokenizer", "decode", folder, "7"]
    assert subprocess.run(command_line, check=True, capture_output=True, text=True).stdout == "("
