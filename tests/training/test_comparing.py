"""The reference's log-probabilities are kept, and computed anew where the answers are others."""

import types

import numpy as np
import pytest

from qwen_jax.data.conversations import Document
from qwen_jax.data.preferences import Answers, PreferenceRows
from qwen_jax.training import comparing


class Documents(list):
    lengths = property(lambda self: np.array([len(document.ids) for document in self]))


def rows(*answers, learned_from=1):
    documents = Documents(Document(np.array(ids, np.int32), np.arange(len(ids)) >= learned_from) for ids in answers)
    groups = np.repeat(np.arange(len(documents) // 2), 2)
    return PreferenceRows(Answers(documents, np.arange(len(documents), dtype=np.float32), groups, ["a"] * 9), 16, 4)


@pytest.fixture
def asked(monkeypatch):
    """Counts how often the reference is asked; it says an answer's number plus a hundred times how often it was."""
    told = []

    def of_each_answer(function, some, built, params):
        told.append(params)
        return np.arange(len(some.answers.values), dtype=np.float32) + 100 * len(told)

    monkeypatch.setattr(comparing, "of_each_answer", of_each_answer)
    return told


def kept(path, some):
    comparing.keep_reference(path, {"train": some}, None, types.SimpleNamespace(), lambda: "reference", label="test")
    return some.reference.tolist()


def test_what_is_kept_is_read_and_other_answers_are_noticed(tmp_path, asked, capsys):
    path = tmp_path / "reference.npz"
    assert kept(path, rows([1, 2, 3], [1, 4])) == [100, 101] == kept(path, rows([1, 2, 3], [1, 4]))
    assert len(asked) == 1 and "WARNING" not in capsys.readouterr().out
    others = [rows([1, 2, 3], [1, 5]), rows([1, 2], [3, 1, 5]), rows([1, 2], [3, 1, 5], learned_from=2)]
    for count, other in enumerate(others, 2):  # another token, another border, another mask
        assert kept(path, other) == [100 * count, 100 * count + 1]
        assert "WARNING: the comparisons are no longer those" in capsys.readouterr().out
    assert kept(path, others[-1]) == [400, 401] and len(asked) == 4


def test_a_file_that_does_not_know_its_answers_is_not_trusted(tmp_path, asked, capsys):
    np.savez(tmp_path / "reference.npz", train=np.zeros(2, np.float32))
    assert kept(tmp_path / "reference.npz", rows([1, 2], [3, 4])) == [100, 101]
    assert "WARNING" in capsys.readouterr().out
