"""A data set by name to packed rows: found, tokenised or taken from the cache, checked, packed, mixed."""

from typing import Literal, NamedTuple

import numpy as np

from qwen_jax.batches import LMBatch
from qwen_jax.data import sources, token_cache
from qwen_jax.data.packing import Joined, MixedRows, PackedRows, first_of_each
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer

BadRecords = Literal["error", "skip"]


class Rows(NamedTuple):
    """Rows to train on.

    Attributes:
      rows: the rows.
      told: what they were made of and what that cost, as lines for the reader.
    """

    rows: PackedRows | MixedRows
    told: list[str]


def rows(
    dataset: str,
    split: str,
    tok: Tokenizer,
    rendering: Rendering,
    *,
    bad_records: BadRecords = "error",
    hold_out: bool = True,
    workers: int | None = None,
) -> Rows:
    """The packed rows of a data set's split.

    Sources without weights are packed together; those with weights each by themselves, to be drawn by weight.

    Args:
      dataset, split, hold_out: as in `sources.find`.
      tok: the tokenizer.
      rendering: how records become documents; its max_length is the rows' length.
      bad_records: "error" refuses a data set that has any; "skip" leaves them out, and tells of them.
      workers: as in `tokenising.tokenise`.

    Raises:
      InputError: as those two do; on bad records that are not to be skipped; where nothing is left.
    """
    found, told = _tokenised(dataset, split, tok, rendering, bad_records, hold_out, workers)
    length = rendering.max_length
    if found[0].source.weight is None:
        packed = PackedRows(joined([made.documents for made in found]), length)
    else:
        parts = [PackedRows(made.documents, length) for made in found]
        packed = MixedRows(parts, [made.source.weight for made in found])
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
    """The first packed rows of a split, source by source: each is a domain with a loss of its own.

    Args:
      dataset, tok, rendering, split, bad_records, hold_out, workers: as in `rows`.
      count: how many rows in all, about; shared out by the sources' weights, or by their sizes if they have none.

    Raises:
      InputError: as `rows`.
    """
    found, told = _tokenised(dataset, split, tok, rendering, bad_records, hold_out, workers)
    names = sources.short_names([made.source.name for made in found])
    parts = {name: PackedRows(made.documents, rendering.max_length) for name, made in zip(names, found, strict=True)}
    weights = None if found[0].source.weight is None else [made.source.weight for made in found]
    first = first_of_each(parts, count, weights)
    sizes = ", ".join(f"{name} {len(some):,} of {len(parts[name]):,}" for name, some in first.items())
    return HeldOut(first, [*told, f"rows that each evaluation reads: {sizes}"])


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
