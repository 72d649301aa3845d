"""How well a vocabulary fits a text: bytes per token, side by side with another vocabulary, as a table and a plot."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.face import Tokenizer


@dataclasses.dataclass(frozen=True)
class Fit:
    """One vocabulary on one text.

    Attributes:
        tokenizer, text: their names.
        bytes: UTF-8 bytes that the tokens spell (after normalisation).
        tokens: how many tokens that takes.
    """

    tokenizer: str
    text: str
    bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """The more, the shorter the model's sequences."""
        return self.bytes / self.tokens


def compare(tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Iterable[str]]) -> list[Fit]:
    """Encodes every text with every tokenizer.

    Args:
        tokenizers: by name.
        texts: by name, usually a language's, each an iterable of strings, read once.

    Returns:
        One `Fit` for each pair, texts in order and tokenizers in order within.

    Raises:
        InputError: a text is empty.
    """
    fits = []
    for text_name, parts in texts.items():
        spelt, tokens = dict.fromkeys(tokenizers, 0), dict.fromkeys(tokenizers, 0)
        for part in parts:
            for name, tok in tokenizers.items():
                ids = tok.encode(part)
                tokens[name] += len(ids)
                spelt[name] += len(tok.decode_bytes(ids))
        if not all(tokens.values()):
            raise InputError(f"text {text_name!r} is empty; bytes per token need at least one token")
        fits += [Fit(name, text_name, spelt[name], tokens[name]) for name in tokenizers]
    return fits


def table(fits: Sequence[Fit]) -> str:
    """The comparison as a Markdown table: bytes per token, and each as a share of the last tokenizer's."""
    tokenizers, texts = _names(fits)
    rows = [
        [
            "text",
            "bytes",
            *(f"{name}: bytes/token" for name in tokenizers),
            *(f"{name}: relative" for name in tokenizers[:-1]),
        ]
    ]
    for text in texts:
        fit = {name: next(f for f in fits if (f.tokenizer, f.text) == (name, text)) for name in tokenizers}
        rates = [fit[name].bytes_per_token for name in tokenizers]
        relative = [f"{rate / rates[-1]:.2f}x" for rate in rates[:-1]]
        rows.append([text, f"{fit[tokenizers[-1]].bytes:,}", *(f"{rate:.3f}" for rate in rates), *relative])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plot(fits: Sequence[Fit], path: str | os.PathLike) -> None:
    """Draws bytes per token as bars, a group for each text.

    Args:
        fits: the comparison.
        path: the image to write; its suffix names the format.
    """
    from matplotlib.figure import Figure

    tokenizers, texts = _names(fits)
    figure = Figure(figsize=(2.5 + 1.5 * len(texts), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(tokenizers)
    for number, name in enumerate(tokenizers):
        rates = [fit.bytes_per_token for fit in fits if fit.tokenizer == name]
        places = [place + (number - (len(tokenizers) - 1) / 2) * width for place in range(len(texts))]
        axes.bar_label(axes.bar(places, rates, width, label=name), fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(texts)), texts)
    axes.set_ylabel("bytes per token")
    axes.set_title("Bytes per token: more is shorter sequences")
    axes.margins(y=0.15)
    axes.legend()
    figure.savefig(path, dpi=120)


def _names(fits: Sequence[Fit]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(fit.tokenizer for fit in fits)), list(dict.fromkeys(fit.text for fit in fits))
