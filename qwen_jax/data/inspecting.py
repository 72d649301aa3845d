"""What is to be known of a data set before it is trained on: lengths, what a limit costs, what is learned."""

import dataclasses
import pathlib
import re

import numpy as np

from qwen_jax.data import packing
from qwen_jax.data.conversations import Document
from qwen_jax.tokenizer import Tokenizer

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_UNSEEN = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")  # control characters, which could command a terminal
_BAR = 40  # columns


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens per document, and what a limit would do.

    Attributes:
      lengths: [n] tokens of each document, n at least 1.
      limit: the limit.
    """

    lengths: np.ndarray
    limit: int

    def lines(self) -> list[str]:
        """What they are, as lines."""
        lengths, over = self.lengths, self.lengths > self.limit
        quantiles = np.percentile(lengths, (50, 90, 99)).astype(int)
        lost = int((lengths[over] - self.limit).sum())
        cut = np.minimum(lengths, self.limit)
        rows = int(packing.best_fit(cut, self.limit).max()) + 1
        return [
            f"documents: {len(lengths):,}, tokens: {lengths.sum():,}; tokens a document: mean {lengths.mean():,.0f}, "
            f"median {quantiles[0]:,}, 90% {quantiles[1]:,}, 99% {quantiles[2]:,}, longest {lengths.max():,}",
            f"longer than {self.limit:,}: {int(over.sum()):,} documents ({over.mean():.2%}); truncation would lose "
            f"{lost:,} tokens ({lost / lengths.sum():.2%})",
            f"packed, truncated: {rows:,} rows of {self.limit:,}, {cut.sum() / (rows * self.limit):.1%} full",
            *self._bars(),
        ]

    def _bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds, powers of two, and the count between each two."""
        top = int(np.ceil(np.log2(self.lengths.max() + 1)))
        bounds = 2 ** np.arange(max(0, int(np.log2(max(1, self.lengths.min())))), top + 1)
        return bounds, np.histogram(self.lengths, bounds)[0]

    def _bars(self) -> list[str]:
        bounds, counts = self._bins()
        pairs = zip(bounds[:-1], bounds[1:], counts, strict=True)
        return [
            f"{low:>9,} to {high - 1:>9,} {'#' * -(-_BAR * int(count) // int(counts.max())):<{_BAR}} {count:,}"
            for low, high, count in pairs
        ]

    def plot(self, path: pathlib.Path) -> None:
        """Writes the histogram as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        bounds, _ = self._bins()
        axis.hist(self.lengths, np.geomspace(bounds[0], bounds[-1], 50))
        axis.axvline(self.limit, ls="--", color="grey", label=f"limit {self.limit:,}: {self._over():.1%} are longer")
        axis.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="lengths")
        axis.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)

    def _over(self) -> float:
        return float((self.lengths > self.limit).mean())


def rendered(document: Document, tok: Tokenizer, *, colour: bool) -> str:
    """A document as text that shows what is learned: green, or between ⟦ and ⟧ where there is no colour.

    Control characters of the text are spelt out, so that data cannot command a terminal.
    """
    marks = {True: (_GREEN, _PLAIN), False: (_DIM, _PLAIN)} if colour else {True: ("⟦", "⟧"), False: ("", "")}
    bounds = [0, *(np.flatnonzero(np.diff(document.loss_mask)) + 1).tolist(), len(document.ids)]
    text = ""
    for start, stop in zip(bounds, bounds[1:], strict=False):
        begin, end = marks[bool(document.loss_mask[start])]
        said = tok.decode_bytes(document.ids[start:stop].tolist(), continued=start > 0).decode("utf-8", "replace")
        text += begin + _UNSEEN.sub(lambda found: repr(found[0])[1:-1], said) + end
    return text
