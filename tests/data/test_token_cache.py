"""Tokenised records: the same as tokenised one by one, once, in any number of processes, and never stale."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qwen_jax import tokenizer
from qwen_jax.data import conversations, datasets, sources, token_cache, tokenising
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError

from .test_sources import chats, write

TOK = tokenizer.train(["q 1 a 2 and some words more of it"], 270)
OTHER = tokenizer.train(["something else q q a a entirely"], 265)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def cached(dataset, folder, tok=TOK, split="train", **options):
    hold_out, workers = options.pop("hold_out", False), options.pop("workers", 1)
    found = sources.find(dataset, split, hold_out=hold_out)
    return token_cache.tokenised(found, tok, Rendering(**options), workers=workers, folder=folder)


def plain(documents):
    return [(document.ids.tolist(), document.loss_mask.tolist()) for document in documents]


def expected(some, tok=TOK, **options):
    return plain(conversations.chat_documents(some, tok, generation="qwen2", **options).documents)


def made(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_what_is_stored_is_what_was_rendered(folder):
    write(folder.parent / "a.jsonl", chats(300))
    write(folder.parent / "b.jsonl", chats(9, "other"))
    (found,) = cached("*.jsonl", folder, max_length=64, too_long="truncate")
    both = expected(chats(300) + chats(9, "other"), max_length=64, too_long="truncate")
    assert plain(found.documents) == both and {len(ids) for ids, _ in both} == {62, 64}
    assert found.documents.lengths.tolist() == [len(document.ids) for document in found.documents]
    assert found.documents[0].ids.dtype == np.int32 and found.documents[0].loss_mask.dtype == bool


def test_splits_of_one_file_share_its_tokens(folder):
    write(folder.parent / "a.jsonl", chats(300))
    train, validation = (cached("a.jsonl", folder, split=s, hold_out=True)[0] for s in ("train", "validation"))
    assert len(made(folder)) == 1
    for split, found in (("train", train), ("validation", validation)):
        assert plain(found.documents) == expected(list(sources.load("a.jsonl", split)))


def test_it_is_made_once_and_again_when_anything_that_matters_changes(folder, monkeypatch):
    write(folder.parent / "a.jsonl", chats(20))
    work = []
    piece = tokenising.piece
    monkeypatch.setattr(tokenising, "piece", lambda *args: work.append(1) or piece(*args))

    def is_made(**options):
        work.clear()
        (found,) = cached("a.jsonl", folder, **options)
        return bool(work), plain(found.documents)

    assert is_made() == (True, expected(chats(20)))
    assert is_made() == (False, expected(chats(20)))
    os.rename("a.jsonl", "b.jsonl")
    os.rename("b.jsonl", "a.jsonl")
    assert not is_made()[0]
    assert is_made(tok=OTHER) == (True, expected(chats(20), OTHER))
    for options in ({"loss": "qwen-finetune"}, {"max_length": 40, "too_long": "drop"}, {"generation": "qwen"}):
        assert is_made(**options)[0] and not is_made(**options)[0]
    write(folder.parent / "a.jsonl", chats(21))
    assert is_made() == (True, expected(chats(21)))
    monkeypatch.setattr(token_cache, "_code_hash", lambda: "another version")
    assert is_made()[0]


def test_a_damaged_entry_is_made_again(folder):
    write(folder.parent / "a.jsonl", chats(20))
    cached("a.jsonl", folder)
    (entry,) = made(folder)
    with open(folder / entry / "ids", "r+b") as file:
        file.truncate(10)
    assert plain(cached("a.jsonl", folder)[0].documents) == expected(chats(20))
    assert made(folder) == [entry]


def test_what_was_interrupted_leaves_nothing(folder, monkeypatch):
    write(folder.parent / "a.jsonl", chats(600))
    piece, calls = tokenising.piece, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return piece(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenising, "piece", fails)
        cached("a.jsonl", folder)
    assert made(folder) == []
    assert plain(cached("a.jsonl", folder)[0].documents) == expected(chats(600))


PROGRAM = """
import os, pathlib, sys
import jax
from qwen_jax import tokenizer
from qwen_jax.data import sources, token_cache, tokenising
from qwen_jax.data.tokenising import Rendering
tokenising._FEW = 1
if __name__ == "__main__":
    tok = tokenizer.load(sys.argv[1])
    found = sources.find("a.jsonl,b.json", "train", hold_out=False)
    made = token_cache.tokenised(found, tok, Rendering(), workers=2, folder=pathlib.Path(sys.argv[2]))
    print(*(len(some.documents) for some in made))
else:
    print("a worker imported the program, and JAX with it")
"""


def test_processes_make_the_same_and_do_not_load_the_program_that_started_them(folder):
    write(folder.parent / "a.jsonl", chats(1500))
    (folder.parent / "b.json").write_text(json.dumps([{"messages": chat} for chat in chats(700, "other")]))
    TOK.save(folder.parent / "tok")
    (folder.parent / "program.py").write_text(PROGRAM)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, "program.py", "tok", str(folder)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.stdout == "1500 700\n", result.stderr
    tok = tokenizer.load(folder.parent / "tok")
    entries = made(folder)
    (a,), (b,) = cached("a.jsonl", folder, tok), cached("b.json", folder, tok)
    assert made(folder) == entries  # found, not made again
    assert plain(a.documents) == expected(chats(1500), tok)
    assert plain(b.documents) == expected(chats(700, "other"), tok)


def test_a_killed_process_is_one_line(folder, monkeypatch):
    write(folder.parent / "a.jsonl", chats(600))
    monkeypatch.setattr(tokenising, "_FEW", 1)
    monkeypatch.setattr(tokenising, "_start", divmod)  # the processes end as they begin
    with pytest.raises(InputError, match="^a process that tokenises was killed"):
        cached("a.jsonl", folder, workers=2)
    assert made(folder) == []


BAD = [{"messages": [{"role": "user", "content": "q"}]}, {"text": "x"}, {"messages": "x"}]


def bad_file(path, count=3):
    good = [{"messages": chat} for chat in chats(5)]
    path.write_text("\n".join([*map(json.dumps, good), "{", "", *map(json.dumps, (BAD * count)[:count])]))


def test_bad_records_are_told_with_file_and_line_and_counted_by_kind(folder):
    bad_file(folder.parent / "a.jsonl", 30)
    for _ in ("made", "found"):
        (found,) = cached("a.jsonl", folder)
        (account,) = found.accounts
        assert plain(found.documents) == expected(chats(5))
        assert str(account) == (
            "a.jsonl: format messages, 36 records, 31 bad (10 no answer, 10 missing field, 10 wrong type, 1 not JSON)"
        )
        lines = account.lines()
        assert len(lines) == 21 and lines[0].startswith("a.jsonl, line 6: not JSON: Expecting property name")
        assert lines[1].startswith("a.jsonl, line 8: no answer: ") and lines[-1] == "a.jsonl: 11 more bad records"


def test_the_counts_of_a_limit_are_told(folder):
    write(folder.parent / "a.jsonl", [*chats(3), chats(1)[0] * 30])
    (account,) = cached("a.jsonl", folder, max_length=80, too_long="split")[0].accounts
    assert str(account) == "a.jsonl: format messages, 4 records; 1 split"
    (account,) = cached("a.jsonl", folder, max_length=60, too_long="truncate")[0].accounts
    lost = sum(len(ids) - 60 for ids, _ in expected([*chats(3), chats(1)[0] * 30]))
    assert str(account).endswith(f"4 records; 4 truncated; {lost:,} tokens lost to the length limit")
    (account,) = cached("a.jsonl", folder, max_length=80)[0].accounts
    assert account.bad == {"too long": 1} and "line 4: too long: has " in account.lines()[0]


def test_pairs_are_stored_half_by_half_with_their_margins(folder):
    records = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad" * 40, "margin": n + 1} for n in range(4)]
    (folder.parent / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (found,) = cached("a.jsonl", folder, pairs=True)
    said = [TOK.decode(document.ids[document.loss_mask]) for document in found.documents]
    assert said == ["good<|im_end|>", "bad" * 40 + "<|im_end|>"] * 4
    assert TOK.decode(found.documents[7].ids).endswith("user\nq3<|im_end|>\n<|im_start|>assistant\n" + said[7])
    assert found.documents.values.tolist() == [1, 0, 2, 0, 3, 0, 4, 0]
    assert found.documents.compared.tolist() == [2] * 8
    (found,) = cached("a.jsonl", folder, pairs=True, max_length=60, too_long="drop")
    assert len(found.documents) == 0 and found.accounts[0].counts["dropped_long"] == 8  # never half a pair


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format is 'csv'; expected one of auto, messages, sharegpt, alpaca, qwen"),
        ({"generation": "qwen9"}, "qwen9"),
        ({"loss": "all"}, "loss 'all' is not known"),
        ({"too_long": "cut"}, "too_long is 'cut'"),
        ({"pairs": True, "too_long": "truncate"}, "too_long is 'truncate'; for a pair it can be drop, error"),
        ({"max_length": 1}, "max_length is 1"),
        ({"tok": tokenizer.train(["ab"], 257, special_tokens=["<|x|>"])}, "has no control token <|im_start|>"),
    ],
)
def test_a_rendering_that_cannot_be_is_told_before_any_record_is_read(options, message, folder):
    write(folder.parent / "a.jsonl", chats(3))
    with pytest.raises(InputError) as error:
        cached("a.jsonl", folder, **options)
    assert message in str(error.value) and made(folder) == []


def test_a_cache_that_cannot_be_written_is_one_line(folder):
    write(folder.parent / "a.jsonl", chats(3))
    (folder.parent / "file").write_text("")
    with pytest.raises(InputError, match="cache folder .*file/tokens cannot be written"):
        cached("a.jsonl", folder.parent / "file" / "tokens")


def test_an_empty_file_is_a_file_without_records(folder):
    (folder.parent / "a.jsonl").write_text("")
    (found,) = cached("a.jsonl", folder)
    assert len(found.documents) == 0 and str(found.accounts[0]) == "a.jsonl: format unknown, 0 records"


def test_a_parts_records_in_memory_leave_nothing_in_the_cache(folder):
    (found,) = cached("made-up", folder, split="validation")
    assert plain(found.documents) == expected(sources.load("made-up", "validation"))
    assert made(folder) == []


def rows(dataset, folder, monkeypatch, split="train", **options):
    monkeypatch.setenv("QWEN_JAX_CACHE", str(folder))
    return datasets.rows(dataset, split, TOK, Rendering(max_length=64, too_long="split"), **options)


def test_a_data_set_with_bad_records_is_refused_in_a_line_or_told_line_by_line(folder, monkeypatch):
    bad_file(folder.parent / "a.jsonl")
    with pytest.raises(InputError) as error:
        rows("a.jsonl", folder, monkeypatch)
    for part in ("9 records, 4 bad (", "the first: a.jsonl, line 6: not JSON: ", "--bad-records skip"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    made = rows("a.jsonl", folder, monkeypatch, bad_records="skip", hold_out=False)
    assert len(made.told) == 6 and made.told[-1].startswith("5 documents, ") and made.rows.tokens > 0


def test_no_document_for_a_split_is_one_line(folder, monkeypatch):
    write(folder.parent / "a.jsonl", chats(2))
    with pytest.raises(InputError, match="^a.jsonl: no document for split 'validation' .*2 records"):
        rows("a.jsonl", folder, monkeypatch, split="validation")


def test_held_out_rows_of_a_mixture_are_packed_source_by_source(folder, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_CACHE", str(folder))
    few, many = chats(9), [[{"role": "user", "content": f"and {n}"}, *chats(1)[0][1:]] for n in range(60)]
    write(folder.parent / "few.jsonl", few)
    write(folder.parent / "many.jsonl", many)
    rendering = Rendering(max_length=256, too_long="split")
    ids = lambda some: sorted(ids for ids, _ in expected(some))
    for dataset, count, expected_shares in (
        ("few.jsonl,many.jsonl", 999, None),  # all there is
        ("few.jsonl:1,many.jsonl:3", 8, (2, 6)),
        ("few.jsonl:1,many.jsonl:99", 4, (1, 4)),
    ):
        made = datasets.held_out(dataset, TOK, rendering, count=count, hold_out=False)
        assert list(made.rows) == ["few", "many"] and "few" in made.told[-1]
        if expected_shares:
            assert tuple(map(len, made.rows.values())) == expected_shares
        for rows, said in zip(made.rows.values(), (few, many), strict=True):
            documents = [
                row.tokens[row.segment_ids == n].tolist() for row in rows for n in range(1, row.segment_ids.max() + 1)
            ]
            assert sorted(documents) == ids(said) if expected_shares is None else all(d in ids(said) for d in documents)


def test_held_out_rows_are_packed_by_the_domains_that_records_name(folder, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_CACHE", str(folder))
    said = [[{"role": "user", "content": f"and {n}"}, *chats(1)[0][1:]] for n in range(60)]
    fields = [{"domain": "code"}, {"source": "math/a b"}, {}, {"domain": 3, "source": "x" * 50}]
    records = [{"messages": chat, **fields[n % 4]} for n, chat in enumerate(said)]
    (folder.parent / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder.parent / "b.jsonl").write_text(
        "\n".join(json.dumps({**r, "domain": f"address {n}"}) for n, r in enumerate(records))
    )
    rendering = Rendering(max_length=256, too_long="split")
    made = datasets.held_out("a.jsonl", TOK, rendering, count=999, hold_out=False)
    of = {"code": said[::4], "math_a_b": said[1::4], "none": [chat for n, chat in enumerate(said) if n % 4 > 1]}
    assert made.rows.keys() == of.keys()
    for name, rows in made.rows.items():
        documents = [
            row.tokens[row.segment_ids == n].tolist() for row in rows for n in range(1, 9) if n in row.segment_ids
        ]
        assert sorted(documents) == sorted(ids for ids, _ in expected(of[name]))
    both = datasets.held_out("a.jsonl:1,b.jsonl:1", TOK, rendering, count=20, hold_out=False)
    sizes = {name: len(rows) for name, rows in both.rows.items()}
    assert sizes.keys() == {"a_code", "a_math_a_b", "a_none", "b"}  # 60 values in b are no domains
    assert sizes["b"] == 10 and sizes["a_none"] == 5 and abs(sizes["a_code"] - 2.5) < 1


def test_short_names_tell_sources_apart():
    names = ["chats/a.jsonl.gz", "gs://b/c/*.parquet", "chitchat", "b/a.jsonl", "tfds_set/config:1.0.0"]
    assert sources.short_names(names) == ["a_1", "*", "chitchat", "a_4", "tfds_set_config:1.0.0"]
    assert sources.names(" a.jsonl:0.7, b.parquet:0.3,") == ["a.jsonl", "b.parquet"]
