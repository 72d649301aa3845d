"""The command line: `python -m qwen_jax.data inspect | tokenise`."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import tyro

from qwen_jax import tokenizer
from qwen_jax.data import datasets, formats, inspecting, sources, token_cache
from qwen_jax.data.conversations import TooLong
from qwen_jax.data.packing import Joined
from qwen_jax.data.tokenising import AUTO, Rendering
from qwen_jax.errors import InputError, boxes_as_lines


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Looks through data as training would: formats, bad records, lengths, and an example with its loss mask.

    What is learned is shown in green, or between ⟦ and ⟧ where there are no colours.
    """

    dataset: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs, URLs, or names of data sets."""
    tokenizer: pathlib.Path
    """A file or folder, such as that of the model to fine-tune."""
    template: str = "qwen2"
    """The Qwen generation whose chat format is used."""
    loss: str = "assistant"
    """What is learned: assistant, last-turn or qwen-finetune."""
    length: int = 2048
    """The limit to look at, in tokens."""
    format: str = AUTO
    """messages, sharegpt, alpaca or qwen; auto finds out."""
    split: str = "train"
    """Of data sets that have splits."""
    examples: int = 1
    """How many documents to show."""
    plot: pathlib.Path | None = None
    """A PNG to draw the lengths in."""
    strict: bool = False
    """End with status 2 if there is any bad record."""

    def run(self) -> None:
        """Prints what there is to know."""
        if self.length < 2 or self.examples < 0:
            raise InputError(f"length is {self.length}, examples {self.examples}; expected at least 2, at least 0")
        tok = tokenizer.load(self.tokenizer)
        found = [
            source for name in self.dataset for source in sources.find(name, self.split, hold_out=False)
        ] or sources.find("", self.split)
        rendering = Rendering(self.template, self.loss, format=self.format, pairs=_pairs(found))
        made = token_cache.tokenised(found, tok, rendering)
        accounts = [account for some in made for account in some.accounts]
        for account in accounts:
            print(account, *account.lines(), sep="\n")
        total = {name: sum(account.counts[name] for account in accounts) for name in ("records", "tokens", "learned")}
        documents = datasets.joined([some.documents for some in made])
        if not len(documents):
            raise InputError(f"none of {total['records']:,} records in {', '.join(self.dataset)} can be used")
        print(
            f"to learn: {total['learned']:,} of {total['tokens']:,} tokens ({total['learned'] / total['tokens']:.1%})"
        )
        lengths = inspecting.Lengths(documents.lengths, self.length)
        print(*lengths.lines(), sep="\n")
        if self.plot:
            lengths.plot(self.plot)
            print(f"lengths drawn in {self.plot}")
        _show(documents, tok, self.examples, np.concatenate([some.documents.compared for some in made]))
        if self.strict:
            datasets.refuse_bad(accounts)


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """Tokenises a data set ahead of a run, which then finds it in the cache ($QWEN_JAX_CACHE)."""

    dataset: tyro.conf.Positional[str]
    """As the run's --dataset; all else is as in the run, too."""
    tokenizer: pathlib.Path
    """That of the run: a file or folder."""
    template: str = "qwen2"
    loss: str = "assistant"
    length: int = 2048
    too_long: TooLong = "split"
    format: str = AUTO
    bad_records: datasets.BadRecords = "error"
    workers: int = 0
    """Processes; 0 for one a core."""

    def run(self) -> None:
        """Fills the cache, and prints what became of the records."""
        rendering = Rendering(self.template, self.loss, self.length, self.too_long, self.format)
        tok, workers = tokenizer.load(self.tokenizer), self.workers or None
        made = datasets.rows(self.dataset, "train", tok, rendering, bad_records=self.bad_records, workers=workers)
        print(*made.told, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; bad input is one line on standard error and status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal lacks a character
    try:
        with boxes_as_lines():
            command = tyro.cli(Inspect | Tokenise, prog="python -m qwen_jax.data", description=__doc__, args=arguments)
        command.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _pairs(found: Sequence[sources.Source]) -> bool:
    """Whether the first record that can be read is a preference pair."""
    for source in found:
        for part in source.parts:
            for _, record in part.records():
                try:
                    record = formats.parsed(record)
                    return formats.is_pair(record) or formats.is_list(record)
                except formats.BadRecord:
                    continue
    return False


def _show(documents: Joined, tok: tokenizer.Tokenizer, count: int, compared: Sequence[int]) -> None:
    """Prints the first documents, or (where answers are compared) all answers to the first prompts."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    place = number = 0
    while number < count and place < len(documents):
        together = int(compared[place])
        for answer in range(together):
            half = {1: "", 2: (" (chosen)", " (rejected)")[answer % 2]}.get(together, f" (answer {answer})")
            print(f"--- {'document' if together == 1 else 'pair' if together == 2 else 'list'} {number}{half}")
            print(inspecting.rendered(documents[place + answer], tok, colour=colour))
        place, number = place + together, number + 1


if __name__ == "__main__":
    sys.exit(main())
