"""Comparisons as rows: whole groups, ends at `<|im_end|>`, nothing lost; bad records; ratings split by sentence."""

import json

import numpy as np
import pytest

from qwen_jax.data import formats, loader, packages, preferences, ratings
from qwen_jax.data.formats import BadRecord
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import chat
from tests.data.test_token_cache import TOK

LIST = {"prompt": "q", "answers": ["best", "good", "bad"]}
U, ANSWERS = {"role": "user", "content": "q"}, [{"role": "assistant", "content": text} for text in LIST["answers"]]


def comparison(record):
    return formats.comparison(record, formats.detect(record))


@pytest.mark.parametrize(
    ("record", "values"),
    [
        (LIST, [3, 2, 1]),
        (LIST | {"scores": [0.5, -2, 7]}, [0.5, -2, 7]),
        (LIST | {"prompt": [U], "answers": ANSWERS}, [3, 2, 1]),
        ({"conversations": [{"from": "human", "value": "q"}], "answers": LIST["answers"]}, [3, 2, 1]),
        ({"instruction": "q", "answers": LIST["answers"]}, [3, 2, 1]),
    ],
)
def test_lists_in_every_form(record, values):
    assert comparison(record) == ([U], ANSWERS, values, None)


def test_a_pair_is_a_list_of_two():
    pair = {"prompt": "q", "chosen": "best", "rejected": "good"}
    assert comparison(pair) == ([U], ANSWERS[:2], [1, 0], None)
    assert comparison(pair | {"score_chosen": 4, "score_rejected": 1.5}).values == [2.5, 0]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (LIST | {"answers": ["only"]}, "one answer"),
        (LIST | {"answers": []}, "one answer"),
        (LIST | {"answers": "best"}, "one answer"),
        (LIST | {"answers": ["a", "a", "b"]}, "equal answers"),
        (LIST | {"scores": [1, 1, 0]}, "ties"),
        (LIST | {"scores": [1, 0]}, "wrong type"),
        (LIST | {"scores": [1, 0, "low"]}, "wrong type"),
        (LIST | {"prompt": ""}, "no prompt"),
        ({"answers": ["a", "b"]}, "no prompt"),
        (LIST | {"answers": ["a", [U]]}, "wrong answer"),
        (LIST | {"answers": ["a", 3]}, "wrong type"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0}, "wrong margin"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}, "wrong margin"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal answers"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "no prompt"),
    ],
)
def test_what_says_nothing_is_told_by_kind(record, kind):
    with pytest.raises(BadRecord) as error:
        comparison(record)
    assert error.value.kind == kind and "\n" not in str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def written(*records, max_length=None, too_long="error", **options):
    with open("p.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    rendering = Rendering(max_length=max_length, too_long=too_long, pairs=True)
    return preferences.load("p.jsonl", "train", TOK, rendering, hold_out=False, **options)


def test_bad_records_are_one_line_with_their_place(here):
    with pytest.raises(InputError, match=r"p\.jsonl, line 2: ties: two answers have the same score") as error:
        written(LIST, LIST | {"scores": [1, 1, 0]})
    assert "\n" not in str(error.value)
    answers, told = written(LIST, LIST | {"scores": [1, 1, 0]}, bad_records="skip")
    assert len(answers.documents) == 3 and any("1 bad (1 ties)" in line for line in told)


def test_a_prompt_over_the_limit_is_told_and_no_answer_is_cut(here):
    long = {"prompt": "q" * 400, "chosen": "good", "rejected": "bad"}
    with pytest.raises(
        InputError, match=r"line 2: too long: has \d+ tokens, \d+ of them the prompt's, the limit is 120"
    ):
        written(LIST, long, max_length=120)
    answers, told = written(LIST, long, max_length=120, too_long="drop")
    assert len(answers.documents) == 3 and any("2 dropped as too long" in line for line in told)


def made(here, count=40, seed=0):
    draw = np.random.default_rng(seed)
    records = [
        {
            "prompt": f"question {n}",
            "answers": [f"a{n}-{k} " * int(draw.integers(1, 9)) for k in range(draw.integers(2, 6))],
        }
        for n in range(count)
    ]
    return records, written(*records)[0]


def test_rows_hold_each_answer_once_beside_the_others_to_its_prompt(here):
    records, answers = made(here)
    longest = max(np.bincount(answers.groups, answers.documents.lengths))
    rows = preferences.PreferenceRows(answers, int(longest) + 50, 7)
    rows.reference = np.arange(len(answers.values), dtype=np.float32)
    seen = []
    for index in range(len(rows)):
        row = rows[index]
        ids, starts = rows.members(index), np.flatnonzero(np.diff(row.segment_ids, prepend=0) > 0)
        assert len(ids) == np.count_nonzero(row.groups) <= 7
        for place, answer in enumerate(ids):
            here_ids = np.flatnonzero(row.segment_ids == place + 1)
            document = answers.documents[answer]
            np.testing.assert_array_equal(row.tokens[here_ids], document.ids)
            np.testing.assert_array_equal(row.positions[here_ids], np.arange(len(here_ids)))
            assert row.ends[place] == here_ids[-1] and TOK.decode([row.tokens[here_ids[-1]]]) == "<|im_end|>"
            learned = row.targets[here_ids][row.loss_mask[here_ids] > 0]
            assert TOK.decode(learned) == TOK.decode(document.ids[document.loss_mask])
            assert (row.values[place], row.reference[place]) == (answers.values[answer], answer)
        groups = answers.groups[ids]
        for group in np.unique(groups):
            assert len({row.groups[place] for place in np.flatnonzero(groups == group)}) == 1
            assert np.count_nonzero(groups == group) == len(records[group]["answers"])
        assert len(np.unique(row.groups[: len(ids)])) == len(np.unique(groups)) and len(starts) == len(ids)
        seen += ids.tolist()
    assert sorted(seen) == list(range(len(answers.values)))


def test_the_documents_are_the_chat_up_to_the_end_of_the_answer(here):
    answers, _ = written(LIST)
    for document, answer in zip(answers.documents, ANSWERS, strict=True):
        ids, _ = chat.render([U, answer], TOK, generation="qwen2", loss="last-turn")
        assert TOK.decode(ids) == TOK.decode(document.ids) + "\n"


@pytest.mark.parametrize(("length", "room", "what"), [(60, 7, "tokens"), (4000, 2, "answers")])
def test_answers_that_do_not_fit_into_a_row_are_one_line(here, length, room, what):
    with pytest.raises(InputError, match=f"{what}, a row has room for"):
        preferences.PreferenceRows(made(here)[1], length, room)


def test_batches_are_a_function_of_seed_and_step_and_the_last_is_filled_up(here):
    rows = preferences.PreferenceRows(made(here)[1], 600, 8)
    first, again = (loader.batches(rows, batch_size=4, seed=3, threads=1) for _ in range(2))
    taken = [next(first) for _ in range(5)]
    again.set_state({"next_index": 3})
    for one, other in zip(taken[3:], again, strict=False):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    halves = [loader.batches(rows, batch_size=4, seed=3, process_index=i, process_count=2, threads=1) for i in (0, 1)]
    for x, *parts in zip(taken[0], *(next(half) for half in halves), strict=True):
        np.testing.assert_array_equal(x, np.concatenate(parts))
    evaluation = list(loader.evaluation(rows, batch_size=4))
    assert sum(int((batch.groups > 0).sum()) for batch in evaluation) == len(rows.answers.values)
    assert all(batch.tokens.shape == (4, 600) for batch in evaluation)


def file_of(lines):
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ratings.FILES.values():
            content = "\r\n".join(lines).encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def rated(tmp_path, monkeypatch):
    """Ratings of made-up sentences; every tenth is a near-copy of another."""
    draw = np.random.default_rng(0)
    lines = [f"{n}\t{draw.uniform(-4, 4):.3f}\tSentence number {n - n % 10 // 9}{'!' * (n % 2)}" for n in range(600)]
    (tmp_path / "ratings.tar.gz").write_bytes(file_of(lines))
    monkeypatch.setattr(packages, "fetch", lambda member: tmp_path / "ratings.tar.gz")
    ratings._sentences.cache_clear()
    yield
    ratings._sentences.cache_clear()


@pytest.mark.parametrize("size", [2, 5])
def test_no_sentence_is_in_two_splits_and_pairs_keep_the_margin(rated, size):
    hashes = {}
    for split in ratings.SPLITS:
        records = ratings.lists("films", split, size=size)
        said = [text for record in records for text in record["answers"]]
        assert len(said) == len(set(said)) > 20
        hashes[split] = {formats.content_hash([{"content": text}]) for text in said}
        for record in records:
            scores = comparison(record).values
            assert scores == sorted(scores, reverse=True) and len(scores) == size
            assert size > 2 or scores[0] - scores[1] >= ratings.MARGIN
        assert records == ratings.lists("films", split, size=size)
        if size == 2 and split == "train":
            assert len(said) > 0.9 * len(ratings.load("films", split))
    assert not hashes["train"] & hashes["validation"] and not hashes["train"] & hashes["test"]
    assert not hashes["validation"] & hashes["test"]


def test_a_domain_or_split_that_there_is_not_is_one_line(rated):
    with pytest.raises(InputError, match="no domain 'books'; expected one of films, products, news, tweets"):
        ratings.load("books", "train")
    with pytest.raises(InputError, match="no split 'dev'; expected one of train, validation, test"):
        ratings.load("films", "dev")
