"""Tokenised records on disk: made once, found again by what they were made of, read without loading them.

Each part of a data set (a file, say) has a folder of flat arrays in the cache, named by a hash of its content, of the
tokenizer, of how records are rendered, and of the code that does it. A folder appears whole or not at all, so any
number of processes and hosts may use one cache.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from qwen_jax.data import packages, sources, tokenising
from qwen_jax.data.conversations import Document
from qwen_jax.data.tokenising import Piece, Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

_DTYPES = {"ids": np.int32, "loss_mask": bool, "lengths": np.int64, "percents": np.uint8, "domains": np.uint16}
_DTYPES |= {"values": np.float32, "compared": np.int32}
MOST_DOMAINS = 32  # in a file: what has more values tells no domains, but addresses, say
_ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of the records of one part.

    Attributes:
      name, unit: the part, and what its records are counted in.
      format: that of its records; None if no record has one.
      counts: records, documents, tokens, learned (tokens to learn), and those of `conversations.Documents`.
      bad: how many records could not be used, by kind.
      shown: (number, message) of the first of them.
    """

    name: str
    unit: str
    format: str | None
    counts: dict[str, int]
    bad: dict[str, int]
    shown: list[tuple[int, str]]

    def __str__(self) -> str:
        text = f"{self.name}: format {self.format or 'unknown'}, {self.counts['records']:,} records"
        if self.bad:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.bad.items(), key=lambda kv: -kv[1]))
            text += f", {sum(self.bad.values()):,} bad ({kinds})"
        told = {"split": "split", "truncated": "truncated", "dropped_long": "dropped as too long"}
        told |= {"dropped_empty": "dropped with nothing to learn", "lost_tokens": "tokens lost to the length limit"}
        return "; ".join([text, *(f"{self.counts[n]:,} {words}" for n, words in told.items() if self.counts.get(n))])

    def lines(self) -> list[str]:
        """The bad records that are kept, a line each, and how many are not."""
        hidden = sum(self.bad.values()) - len(self.shown)
        more = [f"{self.name}: {hidden:,} more bad records"] if hidden else []
        return [f"{self.name}, {self.unit} {number}: {text}" for number, text in self.shown] + more


class StoredDocuments(Sequence):
    """Random access to documents in the cache; the tokens stay on disk until they are asked for.

    Attributes:
      lengths: [n] int64, tokens of each document.
      values: [n] float32, what people think of an answer, of `formats.Comparison`; else NaN.
      compared: [n] int32, how many answers to its prompt stand together; else 1.
      domain_names: what its records say that they are of (`formats.domain`), "" among them.
      domains: [n] uint16, which of these.
    """

    def __init__(self, folders: Sequence[pathlib.Path], percents: range):
        self._ids = [_mapped(folder, "ids") for folder in folders]
        self._loss_mask = [_mapped(folder, "loss_mask") for folder in folders]
        chosen = [_chosen(folder, place, percents) for place, folder in enumerate(folders)]
        self.lengths, self.values, self.compared, self._starts, self._folder_of = (
            np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for arrays in zip(*chosen, strict=True)
        )
        numbered: dict[str, int] = {}
        self.domains = np.concatenate([_domains(folder, percents, numbered) for folder in folders])
        self.domain_names = list(numbered)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        start, folder = int(self._starts[index]), int(self._folder_of[index])
        stop = start + int(self.lengths[index])
        return Document(self._ids[folder][start:stop], self._loss_mask[folder][start:stop])


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """One source of a data set, tokenised."""

    source: sources.Source
    documents: StoredDocuments | list[Document]
    accounts: list[Account]


def tokenised(
    found: Sequence[sources.Source],
    tok: Tokenizer,
    rendering: Rendering,
    *,
    workers: int | None = None,
    folder: pathlib.Path | None = None,
) -> list[Tokenised]:
    """Tokenises what the cache does not have yet, and opens it.

    Args:
      found: as `sources.find` gives them.
      tok: the tokenizer.
      rendering: how records become documents.
      workers: processes, as in `tokenising.tokenise`.
      folder: the cache; `tokens` in `packages.cache_folder()` by default.

    Returns:
      Of each source, its documents of the split, in the order of its records, and an account of every part.

    Raises:
      InputError: as `tokenising.check` and the sources do, or the cache cannot be written.
    """
    tokenising.check(tok, rendering)
    folder = folder or packages.cache_folder() / "tokens"
    made_of = [_fingerprint(tok), dataclasses.asdict(rendering), _code_hash()]
    parts = [part for source in found for part in source.parts]
    with contextlib.ExitStack() as stack:
        targets = {}
        for number, part in enumerate(parts):
            content = part.fingerprint()
            if content is None:  # in memory: there is nothing to find it again by
                targets[number] = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tokens"
            else:
                targets[number] = folder / hashlib.sha256(json.dumps([content, *made_of]).encode()).hexdigest()[:32]
        _fill(parts, targets, tok, rendering, workers)
        result, places = [], iter(range(len(parts)))
        for source in found:
            mine = list(itertools.islice(places, len(source.parts)))
            accounts = [_account(targets[place], parts[place]) for place in mine]
            # A mapped file may lose its name: what was made in memory is gone from the disk when it is let go of.
            documents = StoredDocuments([targets[place] for place in mine], source.percents)
            result.append(Tokenised(source, documents, accounts))
        return result


def _fill(parts, targets: dict[int, pathlib.Path], tok: Tokenizer, rendering: Rendering, workers: int | None) -> None:
    """Makes the folders that are not there, in an order of this process's own.

    Hosts that share a cache and start together then divide the work: each finds done what others have done meanwhile.
    """
    missing = [number for number, target in targets.items() if not _is_whole(target)]
    random.Random().shuffle(missing)

    def blocks():
        for number in missing:
            if not _is_whole(targets[number]):
                some = tokenising.blocks(number, parts[number].records(), rendering.format)
                empty = tokenising.Block(number, None, [])  # so that an empty file has a folder, too
                yield from itertools.chain([empty], some)

    pieces = tokenising.tokenise(blocks(), tok, rendering, workers=workers)
    with contextlib.closing(pieces), tqdm.tqdm(disable=None, unit=" records", desc="tokenising") as bar:
        for number, some in itertools.groupby(pieces, key=lambda piece: piece.part):
            _write(targets[number], _counted(some, bar))


def _counted(pieces: Iterator[Piece], bar) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        bar.update(piece.counts["records"])


def _write(target: pathlib.Path, pieces: Iterator[Piece]) -> None:
    counts, bad, shown, format = collections.Counter(), collections.Counter(), [], None
    domains = {"": 0}
    try:
        with packages.scratch_folder(target.parent) as scratch:
            made = scratch / "made"
            made.mkdir()
            with contextlib.ExitStack() as stack:
                opened = {name: stack.enter_context(open(made / name, "wb")) for name in _DTYPES}
                for piece in pieces:
                    piece.arrays["domains"] = _numbered(piece.domains, domains)[piece.arrays["domains"]]
                    for name, array in piece.arrays.items():
                        opened[name].write(array.tobytes())
                    counts.update(piece.counts)
                    arrays = piece.arrays
                    counts.update(
                        documents=len(arrays["lengths"]),
                        tokens=len(arrays["ids"]),
                        learned=int(arrays["loss_mask"].sum()),
                    )
                    bad.update(piece.bad)
                    shown += piece.shown[: tokenising.SHOWN - len(shown)]
                    format = format or piece.format
            sizes = {name: (made / name).stat().st_size for name in _DTYPES}
            about = {
                "format": format,
                "counts": counts,
                "bad": bad,
                "shown": shown,
                "sizes": sizes,
                "domains": list(domains) if len(domains) <= MOST_DOMAINS else [""] * len(domains),
            }
            (made / _ABOUT).write_text(json.dumps(about))
            try:
                if target.exists():  # damaged, or it would not be made again
                    os.replace(target, scratch / "damaged")
                os.replace(made, target)
            except OSError:
                if not _is_whole(target):  # otherwise another process was faster, with the same result
                    raise
    except OSError as error:
        raise InputError(f"cache folder {target.parent} cannot be written: {error.strerror}") from None


def _numbered(names: Sequence[str], numbered: dict[str, int]) -> np.ndarray:
    """Returns the number of each name, which new ones are given; as many as uint16 holds, others are those of ""."""
    number = lambda name: numbered.setdefault(name, len(numbered)) if len(numbered) < 1 << 16 else numbered.get(name, 0)
    return np.array([number(name) for name in names] or [0], np.uint16)


def _domains(folder: pathlib.Path, percents: range, numbered: dict[str, int]) -> np.ndarray:
    """The numbers of the domains of its documents in these hash classes."""
    numbers, classes = (np.fromfile(folder / name, _DTYPES[name]) for name in ("domains", "percents"))
    mine = numbers[(classes >= percents.start) & (classes < percents.stop)]
    return _numbered(_about(folder)["domains"], numbered)[mine]


def _about(folder: pathlib.Path) -> dict:
    return json.loads((folder / _ABOUT).read_text())


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        return all((folder / name).stat().st_size == size for name, size in _about(folder)["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _account(folder: pathlib.Path, part: sources.Part) -> Account:
    about = _about(folder)
    shown = [(number, text) for number, text in about["shown"]]
    return Account(part.name, part.unit, about["format"], about["counts"], about["bad"], shown)


def _mapped(folder: pathlib.Path, name: str) -> np.ndarray:
    path = folder / name
    return np.memmap(path, _DTYPES[name], "r") if path.stat().st_size else np.zeros(0, _DTYPES[name])


def _chosen(folder: pathlib.Path, place: int, percents: range) -> tuple[np.ndarray, ...]:
    """Lengths, values, numbers compared, starts and the place of the folder, of its documents in these hash classes."""
    names = ("lengths", "values", "compared", "percents")
    lengths, values, compared, classes = (np.fromfile(folder / name, _DTYPES[name]) for name in names)
    mine = (classes >= percents.start) & (classes < percents.stop)
    starts = np.cumsum(lengths) - lengths
    return lengths[mine], values[mine], compared[mine], starts[mine], np.full(np.count_nonzero(mine), place)


def _fingerprint(tok: Tokenizer) -> str:
    """Hash of the files that the tokenizer is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        return _hash_of_files(pathlib.Path(folder).iterdir())


@functools.cache
def _code_hash() -> str:
    """Hash of the code between a record and its tokens, so that a change of it is never answered from the cache."""
    here = pathlib.Path(__file__).parent
    mine = [
        here / f"{name}.py"
        for name in ("turns", "formats", "files", "conversations", "tokenising", "turns", "token_cache")
    ]
    return _hash_of_files([*mine, *(here.parent / "tokenizer").glob("*.py")])


def _hash_of_files(paths) -> str:
    return hashlib.sha256(
        json.dumps([[path.name, packages.file_sha256(path)] for path in sorted(paths)]).encode()
    ).hexdigest()
