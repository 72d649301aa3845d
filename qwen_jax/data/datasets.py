"""A data set by name to packed rows: found, tokenised or taken from the cache, checked, packed, mixed."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from qwen_jax.batches import LMBatch
from qwen_jax.data import sources, token_cache
from qwen_jax.data.buckets import BucketRows
from qwen_jax.data.conversations import Document
from qwen_jax.data.packing import Joined, MixedRows, PackedRows, first_of_each
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

MOST_DOMAINS = 15  # of a source that are evaluated apart, the largest; the rest is one
BadRecords = Literal["error", "skip"]
RowLayout = Literal["packed", "buckets"]


class Rows(NamedTuple):
    """Rows to train on.

    Attributes:
      rows: the rows.
      told: what they were made of and what that cost, as lines for the reader.
    """

    rows: PackedRows | MixedRows | BucketRows
    told: list[str]


def rows(
    dataset: str,
    split: str,
    tok: Tokenizer,
    rendering: Rendering,
    *,
    bad_records: BadRecords = "error",
    hold_out: bool = True,
    layout: RowLayout = "packed",
    workers: int | None = None,
) -> Rows:
    """The rows of a data set's split.

    Sources without weights are packed together; those with weights each by themselves, to be drawn by weight.

    Args:
      dataset, split, hold_out: as in `sources.find`.
      tok: the tokenizer.
      rendering: how records become documents; its max_length is the rows' length.
      bad_records: "error" refuses a data set that has any; "skip" leaves them out, and tells of them.
      layout: "packed", as many documents to a row as fit; or "buckets", one to a row of the least of few lengths.
      workers: as in `tokenising.tokenise`.

    Raises:
      InputError: as those two do; on bad records that are not to be skipped; where nothing is left.
    """
    found, told = _tokenised(dataset, split, tok, rendering, bad_records, hold_out, workers)
    length = rendering.max_length
    weights = None if found[0].source.weight is None else [made.source.weight for made in found]
    if layout == "buckets":
        packed = BucketRows([made.documents for made in found], length, weights)
    elif weights is None:
        packed = PackedRows(joined([made.documents for made in found]), length)
    else:
        parts = [PackedRows(made.documents, length) for made in found]
        packed = MixedRows(parts, weights)
    documents = sum(len(made.documents) for made in found)
    told.append(
        f"{documents:,} documents, {packed.tokens:,} tokens in {len(packed):,} rows, {packed.efficiency:.1%} full"
    )
    return Rows(packed, told)


class HeldOut(NamedTuple):
    """Rows to evaluate on.

    Attributes:
      rows: domain -> rows, none of which holds a document of another domain.
      told: as in Rows.
    """

    rows: dict[str, list[LMBatch]]
    told: list[str]


def held_out(
    dataset: str,
    tok: Tokenizer,
    rendering: Rendering,
    *,
    count: int,
    split: str = "validation",
    bad_records: BadRecords = "error",
    hold_out: bool = True,
    workers: int | None = None,
) -> HeldOut:
    """The first packed rows of a split, domain by domain, each of which has a loss of its own.

    A domain is a source, or what a source's records say in their field domain or source where they differ.

    Args:
      dataset, tok, rendering, split, bad_records, hold_out, workers: as in `rows`.
      count: how many rows in all, about; shared out by the sources' weights, or by their sizes if they have none.

    Raises:
      InputError: as `rows`.
    """
    found, told = _tokenised(dataset, split, tok, rendering, bad_records, hold_out, workers)
    parts, weights, length = {}, [], rendering.max_length
    for name, made in zip(sources.short_names([made.source.name for made in found]), found, strict=True):
        rows = {
            (domain or name if len(found) == 1 else f"{name}_{domain}".rstrip("_")): PackedRows(some, length)
            for domain, some in _by_domain(made.documents).items()
        }
        places = sum(map(len, rows.values()))
        weights += [len(part) * (made.source.weight or places) / places for part in rows.values()]
        parts |= rows
    first = first_of_each(parts, count, weights)
    sizes = ", ".join(f"{name} {len(some):,} of {len(parts[name]):,}" for name, some in first.items())
    return HeldOut(first, [*told, f"rows that each evaluation reads: {sizes}"])


def _by_domain(documents: token_cache.StoredDocuments) -> dict[str, Sequence[Document]]:
    """Returns the documents of each domain, under names that can stand in those of figures; "" if there is but one."""
    numbers, sizes = np.unique(documents.domains, return_counts=True)
    if len(numbers) == 1:
        return {"": documents}
    alone = set(numbers[np.argsort(-sizes, kind="stable")][:MOST_DOMAINS].tolist())
    name = lambda number: re.sub(r"[^\w.-]+", "_", documents.domain_names[number]) if number in alone else "others"
    named = {number: name(number) or "none" for number in numbers.tolist()}
    return {
        wanted: Chosen(documents, np.flatnonzero(np.isin(documents.domains, [n for n in named if named[n] == wanted])))
        for wanted in dict.fromkeys(named.values())
    }


class Chosen(Sequence):
    """Some of the documents: those at `places`."""

    def __init__(self, documents: token_cache.StoredDocuments, places: np.ndarray):
        self._documents, self._places, self.lengths = documents, places, documents.lengths[places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Document:
        return self._documents[int(self._places[index])]


def _tokenised(
    dataset: str, split: str, tok: Tokenizer, rendering: Rendering, bad_records: BadRecords, hold_out: bool, workers
) -> tuple[list[token_cache.Tokenised], list[str]]:
    """Returns the documents of each source, checked, and what became of the records."""
    found = token_cache.tokenised(sources.find(dataset, split, hold_out=hold_out), tok, rendering, workers=workers)
    accounts = [account for made in found for account in made.accounts]
    if bad_records == "error":
        refuse_bad(accounts)
    if empty := [made.source.name for made in found if not len(made.documents)]:
        raise InputError(f"{empty[0]}: no document for split {split!r} ({'; '.join(map(str, accounts[:3]))})")
    return found, [line for account in accounts for line in (str(account), *account.lines())]


def refuse_bad(accounts: list[token_cache.Account]) -> None:
    """Raises InputError in one line if any record could not be used."""
    bad = [account for account in accounts if account.bad]
    if bad:
        files = f" (and {len(bad) - 1} more files like it)" if len(bad) > 1 else ""
        raise InputError(
            f"{bad[0]}{files}; the first: {bad[0].lines()[0]}; expected none: `python -m qwen_jax.data inspect` lists "
            "them, --bad-records skip trains without them"
        )


def joined(documents: list[token_cache.StoredDocuments]) -> Joined:
    """Documents laid end to end, with their lengths."""
    all_of_them = Joined(documents)
    all_of_them.lengths = np.concatenate([some.lengths for some in documents])
    return all_of_them
