"""The command: what it tells of a data set is true, what it shows is what is learned, and mistakes are one line."""

import json
import re

import numpy as np
import pytest

from qwen_jax import tokenizer
from qwen_jax.data import __main__ as command
from qwen_jax.data import conversations, inspecting
from qwen_jax.data.conversations import Document

from .test_sources import chats, write

TOK = tokenizer.train(["q 1 a 2 and some words more of it " * 9], 270)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    TOK.save(tmp_path / "tok")
    return tmp_path


def run(*arguments):
    return command.main([*map(str, arguments), "--tokenizer", "tok"])


def test_inspect_tells_counts_lengths_truncation_and_an_example(here, capsys):
    long = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 100}]
    write(here / "a.jsonl", [*chats(30), long])
    assert run("inspect", "a.jsonl", "--length", 128, "--plot", "plots/lengths.png") == 0
    out = capsys.readouterr().out
    documents = conversations.chat_documents([*chats(30), long], TOK, generation="qwen2").documents
    lengths = np.array([len(document.ids) for document in documents])
    learned, tokens = sum(int(document.loss_mask.sum()) for document in documents), lengths.sum()
    over = lengths[lengths > 128] - 128
    for text in (
        "a.jsonl: format messages, 31 records",
        f"to learn: {learned:,} of {tokens:,} tokens ({learned / tokens:.1%})",
        f"documents: 31, tokens: {tokens:,}; ",
        f"longest {lengths.max():,}",
        f"longer than 128: 1 documents (3.23%); truncation would lose {over[0]:,} tokens ({over[0] / tokens:.2%})",
        "--- document 0",
        "<|im_start|>user\nq 0<|im_end|>\n<|im_start|>assistant\n⟦a 0<|im_end|>⟧\n",
    ):
        assert text in out
    bars = re.findall(r"^ *([\d,]+) to +([\d,]+) (#*) +(\d+)$", out, re.M)
    assert sum(int(count) for *_, count in bars) == 31 and "#" * 40 in {bar for _, _, bar, _ in bars}
    for low, high, _, count in bars:
        low, high = (int(number.replace(",", "")) for number in (low, high))
        assert int(count) == ((lengths >= low) & (lengths <= high)).sum()
    assert (here / "plots" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_bad_records_are_listed_and_strict_is_status_2(here, capsys):
    write(here / "a.jsonl", chats(3))
    with open("a.jsonl", "a") as file:
        file.write("\n{\n")
    assert run("inspect", "a.jsonl", "--examples", 0) == 0
    assert "a.jsonl, line 4: not JSON: " in capsys.readouterr().out
    assert run("inspect", "a.jsonl", "--examples", 0, "--strict") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a.jsonl: format messages, 4 records, 1 bad (1 not JSON)") and err.count("\n") == 1


def test_pairs_are_shown_half_by_half(here, capsys):
    (here / "p.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad"}))
    assert run("inspect", "p.jsonl") == 0
    out = capsys.readouterr().out
    assert "--- pair 0 (chosen)" in out and "⟦good<|im_end|>⟧" in out
    assert "--- pair 0 (rejected)" in out and "⟦bad<|im_end|>⟧" in out


def test_an_example_in_colour_shows_the_mask_and_no_text_commands_the_terminal():
    ids = np.array(TOK.encode("ab\x1b[2Jé"), np.int32)
    mask = np.arange(len(ids)) >= 2
    text = inspecting.rendered(Document(ids, mask), TOK, colour=True)
    assert text == "\x1b[2mab\x1b[0m\x1b[32m\\x1b[2Jé\x1b[0m"
    assert inspecting.rendered(Document(ids, ~mask), TOK, colour=False) == "⟦ab⟧\\x1b[2Jé"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "lost.jsonl"], "lost.jsonl: there is no such file"),
        (["inspect"], "no data set is named"),
        (["inspect", "a.jsonl", "--lenth", 3], "Unrecognized options: --lenth"),
        (["inspect", "a.jsonl", "--length", "abc"], "Error parsing --length"),
        (["inspect", "a.jsonl", "--length", "1"], "length is 1"),
        (["inspect", "a.jsonl", "--format", "csv"], "format is 'csv'; expected one of auto, messages"),
        (["inspect", "a.jsonl", "--template", "qwen9"], "qwen9"),
        (["inspect", "b.jsonl"], "none of 1 records in b.jsonl can be used"),
        (["examine", "a.jsonl"], "Unrecognized"),
        (["tokenise", "b.jsonl"], "1 bad (1 not an object)"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, here, capsys):
    write(here / "a.jsonl", chats(3))
    (here / "b.jsonl").write_text("7")
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_tokenise_fills_the_cache_that_a_run_reads(here, capsys):
    write(here / "a.jsonl", chats(40))
    assert run("tokenise", "a.jsonl:0.5,made-up:0.5", "--length", 128) == 0
    assert "% full" in capsys.readouterr().out
    assert len(list((here / "cache" / "tokens").iterdir())) == 1
