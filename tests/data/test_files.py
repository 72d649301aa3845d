"""Files: every kind, packed or not, near or far, gives the same records; what is broken is told where."""

import gzip
import io
import json
import lzma

import fsspec
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qwen_jax.data import files, formats
from qwen_jax.errors import InputError

RECORDS = [{"messages": [{"role": "user", "content": f'é😀 {n}\n"}},'}]} for n in range(700)]


def lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def as_parquet(records):
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), out, row_group_size=100)
    return out.getvalue()


CONTENTS = {
    "a.jsonl": lines(RECORDS),
    "a.ndjson": lines(RECORDS) + b"\n\n",
    "a.jsonl.gz": gzip.compress(lines(RECORDS)),
    "a.jsonl.xz": lzma.compress(lines(RECORDS)),
    "a.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "lines.json": lines(RECORDS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "a.parquet": as_parquet(RECORDS),
}


def read(path):
    (file,) = files.find(str(path))
    return [(number, formats.parsed(record)) for number, record in file.records()]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("far", [False, True], ids=["local", "store"])
def test_every_kind_of_file_gives_the_records(name, far, tmp_path):
    path = f"memory://{tmp_path.name}/{name}" if far else tmp_path / name
    with fsspec.open(str(path), "wb") as file:
        file.write(CONTENTS[name])
    numbers, records = zip(*read(path), strict=True)
    assert list(records) == RECORDS
    at = {"pretty.json": (2, 10), "a.json": (1, 1), "bom.json": (1, 1), "a.json.gz": (1, 1)}.get(name, (1, 2))
    assert numbers[:2] == at  # a record is known by the line it begins on, or by its row


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
    ),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
    st.booleans(),
)
def test_json_is_read_in_pieces_of_any_size(tmp_path_factory, records, indent, chunk, array):
    path = tmp_path_factory.mktemp("json") / "a.json"
    records = records if array else [[record] for record in records]
    text = json.dumps(records, indent=indent) if array else "\n".join(json.dumps(record) for record in records)
    array_like = not array and text.startswith("[")  # one value that is a list is taken for the list of records
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        if not array_like:
            assert [record for _, record in read(path)] == records


def broken(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (file,) = files.find(str(tmp_path / name))
    return list(file.records())


@pytest.mark.parametrize(
    ("name", "content", "good", "message"),
    [
        ("a.json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', 2, "line 3: expected a comma or ] after an element, found '{'"),
        ("a.json", b'[{"a": 1},\n{"a" 2}' + b" " * 50 + b"]", 1, "line 2: not JSON: Expecting ':' delimiter"),
        ("a.json", b'[{"a": 1}', 1, "the array has no end"),
        ("a.json", b'[{"a": 1}] 2', 1, "text after the end of the array"),
        ("a.json", b'[{"a": "x', 0, "line 1: not JSON: Unterminated string"),
        ("a.json", b'[{"a": 1}, "\xff"]', 0, "can't decode byte 0xff"),
        ("a.json", b"[" * 100_000, 0, "nested too deep"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-30], None, "ended before the end-of-stream marker"),
        ("a.jsonl.gz", b"plain", 0, "Not a gzipped file"),
        ("a.parquet", b"not parquet", 0, "Parquet"),
    ],
)
def test_where_a_file_breaks_off_is_its_last_bad_record(name, content, good, message, tmp_path):
    *before, (_, last) = broken(name, content, tmp_path)
    assert isinstance(last, formats.BadRecord) and last.kind == "broken file" and message in str(last)
    assert "\n" not in str(last)
    assert good is None or len(before) == good


def test_a_line_that_is_no_json_is_a_bad_record_and_the_rest_is_read(tmp_path):
    content = b'{"a": 1}\n\n{"a": \n\xff\n' + b"[" * 100_000 + b'\n{"a": 2}'
    records = broken("a.jsonl", content, tmp_path)
    assert [number for number, _ in records] == [1, 3, 4, 5, 6]
    kinds = []
    for _, record in records:
        try:
            kinds.append(formats.parsed(record))
        except formats.BadRecord as error:
            kinds.append(error.kind)
    assert kinds == [{"a": 1}, "not JSON", "not JSON", "not JSON", {"a": 2}]


def test_folders_and_globs_are_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "deep/a.json.gz", "c.parquet", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [file.name.removeprefix(f"{tmp_path}/") for file in files.find(str(tmp_path))] == [
        "b.jsonl", "c.parquet", "deep/a.json.gz",
    ]  # fmt: skip
    assert [file.kind for file in files.find(f"{tmp_path}/*.jsonl")] == [".jsonl"]


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    (tmp_path / "a.jsonl").write_text("1")
    (tmp_path / "b.jsonl").write_text("1")
    one, two = (file.fingerprint() for file in files.find(str(tmp_path)))
    (tmp_path / "b.jsonl").write_text("2")
    assert one == two != files.find(str(tmp_path / "b.jsonl"))[0].fingerprint()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: there is no such file or folder"),
        ("no*.jsonl", "there is no such file or folder"),
        ("notes.txt", "no file of records; expected .jsonl, .ndjson, .json, .parquet, also compressed"),
        ("odd://bucket/a.jsonl", "odd://bucket/a.jsonl: cannot be reached: Protocol not known: odd"),
    ],
)
def test_what_is_not_there_is_one_line(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError) as error:
        files.find(path)
    assert message in str(error.value) and "\n" not in str(error.value)
