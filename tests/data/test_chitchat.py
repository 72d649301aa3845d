"""The chats: what is kept and merged, splits that cannot leak or move, builds that are whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from qwen_jax.data import chitchat, packages
from qwen_jax.errors import InputError


def chat(*turns):
    """A raw chat of our own: each turn is (sender, text, text, ...)."""
    return {"messages": [[{"sender": s, "text": t, "timestamp": "-"} for t in texts] for s, *texts in turns]}


def raw_file(path, count=60):
    chats = {
        f"id-{i}": chat(("ann", f"what is {i} and {i}?"), ("bob", "let me think", f"it is {2 * i}"), ("ann", "right"))
        for i in range(count)
    }
    path.write_text(json.dumps(chats))
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The builder over a tiny file of our own, and an empty cache."""
    raw = raw_file(tmp_path / "raw.json")
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "fetch", lambda member: raw)
    return tmp_path


def test_messages_in_a_row_become_one_turn_and_the_first_to_write_is_the_user():
    kept, _ = chitchat.clean([[("x", "hi"), ("x", " there "), ("y", "hello"), ("x", "so?")]])
    assert list(kept.values()) == [
        [
            {"role": "user", "content": "hi\nthere"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "so?"},
        ]
    ]


def test_blank_messages_vanish_and_their_neighbours_meet():
    kept, counts = chitchat.clean([[("x", "hi"), ("y", " "), ("x", "anyone?"), ("y", "me")], [("x", "hi"), ("y", "")]])
    assert [[m["content"] for m in c] for c in kept.values()] == [["hi\nanyone?", "me"]]
    assert counts["empty messages dropped"] == 2 and counts["chats without an answer dropped"] == 1


def test_copies_that_differ_in_case_blanks_and_punctuation_are_one():
    kept, counts = chitchat.clean(
        [[("x", "Hello?"), ("y", "hi!")], [("a", "hello"), ("b", "Hi")], [("a", "hello hi"), ("b", "")]]
    )
    assert len(kept) == 1 and counts["copies dropped"] == 1


def test_who_said_what_matters_to_what_counts_as_a_copy():
    kept, _ = chitchat.clean([[("x", "a b"), ("y", "c")], [("x", "a"), ("y", "b c")]])
    assert len(kept) == 2


def test_a_split_is_a_function_of_what_is_said():
    keys = [chitchat.content_hash([{"role": "user", "content": f"word {i}"}]) for i in range(4000)]
    shares = {s: sum(chitchat.split_of(k) == s for k in keys) / len(keys) for s in chitchat.SPLITS}
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.015)
    # Pinned: chats must not wander between the splits of two versions of this code.
    assert [chitchat.split_of(k) for k in keys[:30]].index("test") == FIRST_TEST


FIRST_TEST = 21


def test_what_is_loaded_is_what_was_kept_in_an_order_that_stays(tiny):
    kept, _ = chitchat.clean(chitchat.read_raw(tiny / "raw.json"))
    splits = {split: chitchat.load(split) for split in chitchat.SPLITS}
    for split, conversations in splits.items():
        expected = [c for key, c in kept.items() if chitchat.split_of(key) == split]
        assert sorted(map(str, conversations)) == sorted(map(str, expected))
        assert list(chitchat.load(split)) == list(conversations)
    train = splits["train"]
    assert train[-1] == train[len(train) - 1] and train[1:3] == [train[1], train[2]]
    assert list(chitchat.load("train[:3]")) == train[:3]
    with pytest.raises(IndexError):
        train[len(train)]


def test_a_second_load_needs_no_package(tiny, monkeypatch):
    first = list(chitchat.load("train"))
    monkeypatch.setattr(packages, "fetch", None)
    assert list(chitchat.load("train")) == first


def test_a_damaged_build_is_noticed_and_made_again(tiny, caplog):
    first = list(chitchat.load("train"))
    for file in sorted(chitchat.build().iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert list(chitchat.load("train")) == first, file.name
        assert "damaged" in caplog.text
        caplog.clear()


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from qwen_jax.data import chitchat, packages
packages.fetch = lambda member: pathlib.Path({raw!r})
def kill(path):  # the records are written, the build is not complete
    os.kill(os.getpid(), signal.SIGKILL)
packages.file_sha256 = kill
chitchat.load("train")
"""


def test_a_build_that_was_killed_is_not_trusted(tiny, request):
    program = KILLED.format(root=str(request.config.rootpath), raw=str(tiny / "raw.json"))
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -9
    left = list((tiny / "cache" / "datasets").iterdir())
    assert left and all(p.name.startswith("unfinished-") for p in left)
    assert sum(len(chitchat.load(split)) for split in chitchat.SPLITS) == 60


def test_an_unknown_split_is_one_line_that_lists_the_known(tiny):
    with pytest.raises(InputError, match=r"^chitchat: no split 'dev'; there are train, validation, test"):
        chitchat.load("dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"raw.json: expected the chats as JSON, found "),
        (
            '{"id-1": {"turns": []}}',
            r"raw.json: chat id-1: expected messages of sender and text, found KeyError 'messages'",
        ),
        ('{"id-2": {"messages": [[{"sender": "x"}]]}}', r"raw.json: chat id-2: expected .* KeyError 'text'"),
    ],
)
def test_a_raw_file_of_another_form_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "raw.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        list(chitchat.read_raw(path))


@pytest.mark.skipif(
    os.environ.get("QWEN_JAX_DOWNLOADS") != "1", reason="real data: set QWEN_JAX_DOWNLOADS=1 to fetch it"
)
def test_the_real_chats_are_as_the_module_says():
    _, counts = chitchat.clean(chitchat.read_raw(packages.fetch(packages.CHITCHAT)))
    assert counts == {
        "empty messages dropped": 33,
        "chats without an answer dropped": 3151,
        "copies dropped": 21,
        "chats kept": 3996,
        "messages kept": 242967,
        "turns kept": 135523,
    }
    conversations = {split: chitchat.load(split) for split in chitchat.SPLITS}
    assert {split: len(c) for split, c in conversations.items()} == {"train": 3591, "validation": 200, "test": 205}
    for conversation in conversations["train"]:
        roles = [m["role"] for m in conversation]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and len(roles) >= 2
        assert all(m["content"].strip() == m["content"] != "" for m in conversation)
