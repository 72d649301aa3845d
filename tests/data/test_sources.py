"""Data sets by name: registry, files, TFDS, mixtures; their splits; and every way to name one that is not there."""

import json

import pytest
import tensorflow_datasets as tfds

from qwen_jax.data import formats, sources
from qwen_jax.errors import InputError


def chats(count, word="q"):
    return [
        [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(count)
    ]


def write(path, chats):
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(path)


class OwnChats(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set as a user would write one; found by name, as it is a class that exists."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"conversations": tfds.features.Sequence(turn)})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "extra": self._generate_examples(3)}

    def _generate_examples(self, count):
        for number, chat in enumerate(chats(count)):
            names = {"user": "human", "assistant": "gpt"}
            yield number, {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]}


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))  # from $TFDS_DATA_DIR, read at import


def test_files_are_split_by_what_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", chats(400))
    train, validation = (list(sources.load(path, split)) for split in ("train", "validation"))
    assert sorted(map(str, train + validation)) == sorted(map(str, chats(400)))
    assert 8 <= len(validation) <= 36  # 20 expected: of 400, each held out with 1 chance in 20
    more = write(tmp_path / "b.jsonl", [*chats(50, "new"), *reversed(chats(400))])
    kept = set(map(str, sources.load(more, "validation")))
    assert set(map(str, validation)) <= kept  # whatever is added or moved
    copies = write(tmp_path / "c.jsonl", [[m | {"content": m["content"].upper() + "!"} for m in c] for c in chats(400)])
    assert len(list(sources.load(copies, "validation"))) == len(validation)


def test_several_files_and_formats_are_one_data_set(tmp_path):
    write(tmp_path / "a.jsonl", chats(3))
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "q 0", "output": "a 0"}]))
    (found,) = sources.find(str(tmp_path), "train", hold_out=False)
    assert [len(list(part.records())) for part in found.parts] == [3, 1]
    loaded = [*sources.load(str(tmp_path), "train"), *sources.load(str(tmp_path), "validation")]
    assert sorted(map(str, loaded)) == sorted(map(str, chats(3) + chats(1)))


def test_a_tfds_data_set_by_name_is_prepared_and_read(tfds_folder):
    assert sorted(map(str, sources.load("own_chats", "extra"))) == sorted(map(str, chats(3)))
    train, validation = (list(sources.load("own_chats:1.0.0", split)) for split in ("train", "validation"))
    assert sorted(map(str, train + validation)) == sorted(map(str, chats(200))) and validation
    (whole,) = sources.find("own_chats", "train", hold_out=False)
    assert len(list(whole.parts[0].records())) == 200 and whole.percents == range(100)


def test_a_tfds_data_set_that_cannot_be_read_is_refused(tfds_folder):
    tfds.builder("own_chats").download_and_prepare(file_format="parquet")
    with pytest.raises(InputError, match="as parquet, which cannot be read here; expected array_record"):
        sources.find("own_chats", "train")


def test_mixtures_have_weights(tmp_path):
    a, b = write(tmp_path / "a.jsonl", chats(3)), write(tmp_path / "b.jsonl", chats(3))
    assert [s.weight for s in sources.find(f"{a}:0.7, {b}:3,made-up:1", "train")] == [0.7, 3, 1]
    assert [(s.name, s.weight) for s in sources.find(f"{a},made-up", "train")] == [(a, None), ("made-up", None)]


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        (
            "",
            "train",
            "no data set is named; expected chitchat, made-up, chinese-reviews, python-code, made-up-pairs, ratings",
        ),
        (
            "chit",
            "train",
            "no data set is called 'chit': it is none of chitchat, made-up, chinese-reviews, python-code, made-up",
        ),
        ("lost.jsonl", "train", "lost.jsonl: there is no such file or folder"),
        ("made-up:0.5,made-up", "train", "only some of its sources have a weight"),
        ("made-up:0", "train", "the weight of a source has to be above 0"),
        ("made-up", "dev", "no split 'dev'"),
        ("a.jsonl", "test", "a.jsonl: no split 'test'; expected one of train, validation"),
        ("own_chats:9.9.9", "train", "TFDS cannot give own_chats:9.9.9: "),
    ],
)
def test_what_is_not_there_is_one_line(dataset, split, message, tmp_path, monkeypatch, tfds_folder):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", chats(3))
    with pytest.raises(InputError) as error:
        sources.find(dataset, split)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_loading_names_the_first_bad_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}')
    with pytest.raises(InputError, match="^a.jsonl, line 1: no answer: none of its 1 messages is the assistant's"):
        list(sources.load("a.jsonl", "train"))


def test_chats_of_the_registry_are_records_of_a_format():
    (found,) = sources.find("made-up", "train")
    (part,) = found.parts
    assert [formats.conversation(record, formats.detect(record)).messages for _, record in part.records()] == list(
        sources.load("made-up", "train")
    )
