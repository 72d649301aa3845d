"""The command line: `python -m qwen_jax.tokenizer train | encode | decode | report`."""

import collections
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from qwen_jax import tokenizer
from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.tokenizer import controls, report, writing

_BLOCK = 1 << 20

Files = Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
Source = Annotated[pathlib.Path, tyro.conf.Positional]


def train(
    files: Files,
    /,
    out: pathlib.Path,
    vocab_size: int,
    special_tokens: tuple[str, ...] = controls.CHATML,
    min_frequency: int = 2,
    field: str = "text",
) -> None:
    """Learns a byte-level vocabulary from files and saves it.

    Args:
        files: text files (UTF-8), or .jsonl files with an object a line.
        out: the folder to save to.
        vocab_size: the size to reach, control tokens included.
        special_tokens: control tokens, which follow the regular tokens.
        min_frequency: a pair seen less often is not merged.
        field: the field of a .jsonl line that holds the text.
    """
    if not files:
        raise InputError("train: no file named; give the text files to learn from")
    _check_out(out)
    texts = itertools.chain.from_iterable(_texts(path, field) for path in files)
    tok = tokenizer.train(texts, vocab_size, special_tokens, min_frequency=min_frequency)
    tok.save(out)
    print(f"{out}: {tok.regular_size:,} regular and {len(tok.special_tokens)} control tokens")


def encode(
    path: Source, /, text: str | None = None, file: pathlib.Path | None = None, allow_special: tuple[str, ...] = ()
) -> None:
    """Encodes a text, a file or standard input; prints the ids on one line.

    Args:
        path: the tokenizer: a file or folder.
        text: the text.
        file: or the file (UTF-8) that holds it.
        allow_special: control tokens that the text may contain as such; "all" for all. All text is data otherwise.
    """
    tok = tokenizer.load(path)
    if text is not None and file is not None:
        raise InputError("encode: --text and --file are two ways to give a text; give one")
    if text is None:
        with _opened(file) if file else sys.stdin.buffer as source:
            text = _decoded(source.read(), str(file or "standard input"))
    print(*tok.encode(text, allowed_special="all" if allow_special == ("all",) else set(allow_special)))


def decode(
    path: Source, ids: Annotated[tuple[int, ...], tyro.conf.Positional] = (), /, skip_special: bool = False
) -> None:
    """Decodes ids, given or read from standard input; prints the text as it is.

    Args:
        path: the tokenizer: a file or folder.
        ids: the ids, separated by spaces.
        skip_special: leave out control tokens.
    """
    tok = tokenizer.load(path)
    try:
        ids = ids or tuple(int(word) for word in sys.stdin.read().replace(",", " ").split())
    except ValueError as error:
        raise InputError(f"standard input: {error}; ids are integers separated by spaces or commas") from None
    sys.stdout.write(tok.decode(ids, skip_special=skip_special))


def compare(
    path: Source,
    texts: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    against: pathlib.Path,
    out: pathlib.Path,
    field: str = "text",
) -> None:
    """Compares bytes per token with another vocabulary, such as Qwen's; writes report.md, report.json, report.png.

    Args:
        path: the tokenizer: a file or folder.
        texts: text or .jsonl files, a language each, as language=file or file.
        against: the tokenizer to compare with, such as qwen.tiktoken.
        out: the folder to write to.
        field: the field of a .jsonl line that holds the text.
    """
    if not texts:
        raise InputError("report: no text named; give language=file for each language")
    _check_out(out)
    named = [text.partition("=") if "=" in text else (pathlib.Path(text).stem, "=", text) for text in texts]
    twice = [name for name, times in collections.Counter(name for name, _, _ in named).items() if times > 1]
    if twice:
        raise InputError(f"report: two texts are called {twice[0]!r}; name them, as language=file")
    label = lambda path: path.name if path.is_dir() else path.stem
    names = (label(path), label(against)) if label(path) != label(against) else (f"{path}", f"{against} (against)")
    tokenizers = dict(zip(names, map(tokenizer.load, (path, against)), strict=True))
    fits = report.compare(tokenizers, {name: _texts(pathlib.Path(file), field) for name, _, file in named})
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"tokenizer": f.tokenizer, "text": f.text, "bytes": f.bytes, "tokens": f.tokens} for f in fits]
    write_whole(out / "report.json", writing.as_json({"fits": rows}))
    write_whole(out / "report.md", report.table(fits) + "\n")
    report.plot(fits, out / "report.png")
    print(report.table(fits))
    print(f"{out}: report.md, report.json, report.png")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; bad input is one line on standard error and status 2."""
    commands = {"train": train, "encode": encode, "decode": decode, "report": compare}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m qwen_jax.tokenizer", args=arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _check_out(out: pathlib.Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; expected a folder or nothing")


def _texts(path: pathlib.Path, field: str) -> Iterator[str]:
    """The texts of a file: the lines of a .jsonl file, else blocks of whole lines."""
    with _opened(path) as file:
        if path.suffix == ".jsonl":
            yield from (_field(line, field, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.strip())
        else:
            while lines := file.readlines(_BLOCK):
                yield _decoded(b"".join(lines), str(path))


def _opened(path: pathlib.Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _field(line: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise InputError(f"{where}: has no text in field {field!r}")
    return value[field]


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: byte 0x{content[error.start]:02X} at offset {error.start}") from None


if __name__ == "__main__":
    sys.exit(main())
