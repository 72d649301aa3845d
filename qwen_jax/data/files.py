"""Files of records: JSON, JSON lines and Parquet, compressed or not, here or in a store, larger than memory or not.

fsspec opens them, so a path may be a file, a folder, a glob, or a URL such as gs://bucket/chats/*.jsonl.gz.
"""

import codecs
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec

from qwen_jax.data import packages
from qwen_jax.data.formats import BadRecord
from qwen_jax.errors import InputError

# How records are counted in a message, by kind of file.
UNITS = {".jsonl": "line", ".ndjson": "line", ".json": "line", ".parquet": "row"}
_CHUNK = 1 << 20
_BREAKS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # pyarrow's errors are ValueErrors or OSErrors
_SPACE = re.compile(r"\s*")


class File(NamedTuple):
    """A file of records.

    Attributes:
      fs: the file system it is on.
      path: where it is there.
      name: as it is shown.
      kind: .jsonl, .ndjson, .json or .parquet.
    """

    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    kind: str

    @property
    def unit(self) -> str:
        """What `records` counts: lines or rows."""
        return UNITS[self.kind]

    def fingerprint(self) -> str:
        """Hash of the content; of a file in a store, of what the store says of it (size, date, checksum)."""
        if _is_local(self.fs):
            return packages.file_sha256(self.path)
        return hashlib.sha256(self.fs.ukey(self.path).encode()).hexdigest()

    def records(self) -> Iterator[tuple[int, Any]]:
        """Reads the file once, from beginning to end.

        Yields:
          (n, record): n is the line it begins on (of Parquet, the row), from 1. The record is a line of JSON as bytes,
          an object, or a BadRecord where the file breaks off, which is then the last.

        Raises:
          InputError: it cannot be opened.
        """
        number = 0
        try:
            opened = fsspec.core.OpenFile(self.fs, self.path, "rb", compression=_compression(self.path)).open()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.name}: cannot be read: {_line(error)}") from None
        with opened as file:
            try:
                for number, record in _READERS[self.kind](file):
                    yield number, record
            except _BREAKS as error:
                detail = f"{_line(error)}; what follows here cannot be read"
                yield number + 1, BadRecord("broken file", detail)


def find(path: str) -> list[File]:
    """The files that a path stands for, in the order of their names.

    Args:
      path: a file, a folder (all files of records in it, at any depth), a glob, or a URL of one.

    Raises:
      InputError: there are none, the file is of no known kind, or its store cannot be reached.
    """
    try:
        fs, root = fsspec.core.url_to_fs(path)
        folder = fs.isdir(root)
        found = fs.glob(root) if _is_glob(path) else fs.find(root) if folder else [root] if fs.exists(root) else []
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be reached: {_line(error)}") from None
    if not found:
        raise InputError(f"{path}: there is no such file or folder, or it is empty")
    kinds = {name: _kind(name) for name in sorted(found) if not os.path.basename(name).startswith((".", "_"))}
    files = [File(fs, name, _shown(fs, name), kind) for name, kind in kinds.items() if kind]
    if not files:
        raise InputError(
            f"{path}: no file of records; expected {', '.join(UNITS)}, also compressed (.gz, .bz2, .xz), found "
            f"{', '.join(os.path.basename(name) for name in sorted(found)[:3])}"
        )
    return files


def looks_like_path(text: str) -> bool:
    """Whether a text is a path rather than the name of a data set."""
    return "://" in text or _is_glob(text) or _kind(text) is not None or os.path.exists(text)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _shown(fs: fsspec.AbstractFileSystem, path: str) -> str:
    if not _is_local(fs):
        return fs.unstrip_protocol(path)
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _compression(path: str) -> str | None:
    return fsspec.utils.infer_compression(path)


def _kind(path: str) -> str | None:
    suffixes = [part.lower() for part in os.path.basename(path).split(".")[1:]]
    if suffixes and _compression(path):
        suffixes.pop()
    kind = f".{suffixes[-1]}" if suffixes else None
    return kind if kind in UNITS else None


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        if not line.isspace():
            yield number, line


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _json_values(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, or values that follow each other, without holding more than one and a chunk."""
    text = _Text(file)
    array = text.peek() == "["
    if array:
        text.skip(1)
    first = True
    while mark := text.peek():
        if array and mark == "]":
            text.skip(1)
            if text.peek():
                raise ValueError(f"line {text.line}: text after the end of the array")
            return
        if array and not first:
            if mark != ",":
                raise ValueError(f"line {text.line}: expected a comma or ] after an element, found {mark!r}")
            text.skip(1)
            text.peek()
        line = text.line
        yield line, text.value()
        first = False
    if array:
        raise ValueError("the array has no end")


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_values, ".parquet": _parquet_rows}


class _Text:
    """A window that moves over a text, and knows its line."""

    def __init__(self, file: BinaryIO):
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()
        self._window, self._at, self._ended = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no blank, or nothing at the end."""
        while True:
            self.skip(_SPACE.match(self._window, self._at).end() - self._at)
            if self._at < len(self._window) or not self._more():
                return self._window[self._at : self._at + 1]

    def skip(self, count: int) -> None:
        self.line += self._window.count("\n", self._at, self._at + count)
        self._at += count

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
                if end < len(self._window) or not self._more():
                    self.skip(end - self._at)
                    return value
            except json.JSONDecodeError as error:
                # An error away from the window's end is one whatever follows, unless it is a string without its end.
                cut = error.pos > len(self._window) - 16 or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    line = self.line + self._window.count("\n", self._at, error.pos)
                    raise ValueError(f"line {line}: not JSON: {error.msg}") from None
            except RecursionError:
                raise ValueError(f"line {self.line}: not JSON: nested too deep") from None

    def _more(self) -> bool:
        """Takes in as much again as is held, so that a long value is not tried often; False at the end."""
        if self._ended:
            return False
        content = self._file.read(max(_CHUNK, len(self._window) - self._at))
        self._ended = not content
        self._window = self._window[self._at :] + self._decode(content, self._ended)
        self._at = 0
        return True
