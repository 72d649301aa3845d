"""Human preferences: 23,455 different sentences that people rated, as pairs and lists to compare.

From `vaderSentiment` 3.3.2 (MIT). About 20 people (15 for films) said of each sentence how positive it is, from -4 to 4
(Hutto and Gilbert, ICWSM 2014); its rating is their mean. Four domains: film reviews, product reviews, newspaper
editorials, tweets. The sentence is taken as the assistant's answer to a request of its domain, and which of two answers
people prefer is which they rated higher, where the ratings differ by at least 1: the classic preference task (Ziegler
et al., arXiv:1909.08593). It ranks sentiment, not helpfulness.

Sentences are split by a hash of their words (80% train, 10% validation, 10% test) before they are put together, so
that none, and no near-copy of one, is in two splits.
"""

import collections
import functools
import html
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qwen_jax.data import packages
from qwen_jax.data.formats import content_hash, percent_of
from qwen_jax.errors import InputError

RATINGS = packages.Member(
    "vaderSentiment",
    "3.3.2",
    "additional_resources/hutto_ICWSM_2014.tar.gz",
    sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
FILES = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
PROMPTS = {
    "films": "Write a positive sentence from a film review.",
    "products": "Write a positive sentence from a product review.",
    "news": "Write a positive sentence from a newspaper editorial.",
    "tweets": "Write a positive tweet.",
}
SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}
MARGIN = 1.0  # ratings that differ by less are no preference


def every(size: int = 2) -> str:
    """Returns the data set of all domains, as `data.sources` knows it: pairs, or lists of `size`."""
    return ",".join(f"ratings-{domain}{f'-{size}' if size > 2 else ''}" for domain in FILES)


class Sentence(NamedTuple):
    """A sentence and the mean of what people gave it, -4 (most negative) to 4."""

    text: str
    rating: float


def load(domain: str, split: str) -> list[Sentence]:
    """The rated sentences of a domain and split, in the file's order, without repetitions.

    Args:
      domain: one of FILES.
      split: one of SPLITS.

    Raises:
      InputError: there is no such domain or split, or the package cannot be fetched.
    """
    for name, value, known in (("domain", domain, FILES), ("split", split, SPLITS)):
        if value not in known:
            raise InputError(f"the sentence ratings have no {name} {value!r}; expected one of {', '.join(known)}")
    return [sentence for key, sentence in _sentences(domain).items() if percent_of(key) in SPLITS[split]]


def lists(domain: str, split: str, *, size: int, seed: int = 0) -> list[dict]:
    """Records of `formats.comparison` that together hold nearly every sentence of a split once.

    Sentences are shuffled, and each list takes the first that fit it: of a pair, those whose ratings differ by at least
    MARGIN; of a longer list, those with no rating twice, where `objectives.reward.pairs` leaves out the comparisons
    below the margin.

    Args:
      domain, split: as in `load`.
      size: answers of a list; 2 makes pairs.
      seed: of the shuffling.
    """
    sentences = load(domain, split)
    order = np.random.default_rng([seed, size]).permutation(len(sentences)).tolist()
    groups = _groups([sentence.rating for sentence in sentences], order, size)
    return [
        {
            "prompt": PROMPTS[domain],
            "answers": [sentences[place].text for place in group],
            "scores": [sentences[place].rating for place in group],
        }
        for group in groups
    ]


def _groups(ratings: list[float], order: list[int], size: int) -> Iterator[list[int]]:
    fits = lambda a, b: abs(a - b) >= MARGIN if size == 2 else a != b
    waiting = collections.deque(order)
    while len(waiting) >= size:
        group, passed = [waiting.popleft()], []
        while len(group) < size and waiting:
            place = waiting.popleft()
            fitting = all(fits(ratings[place], ratings[other]) for other in group)
            (group if fitting else passed).append(place)
        waiting.extendleft(reversed(passed))
        if len(group) == size:
            yield sorted(group, key=lambda place: -ratings[place])


@functools.cache
def _sentences(domain: str) -> dict[str, Sentence]:
    """All sentences of a domain by their hash; of those with one hash the first."""
    found: dict[str, Sentence] = {}
    with tarfile.open(packages.fetch(RATINGS)) as archive:
        content = archive.extractfile(f"hutto_ICWSM_2014/{FILES[domain]}_GroundTruth.txt").read()
    for line in content.decode("utf-8").split("\n"):
        parts = line.strip().split("\t", 2)
        text = html.unescape(parts[-1]).strip().replace("''", '"')
        if len(parts) == 3 and text:
            found.setdefault(content_hash([{"content": text}]), Sentence(text, float(parts[1])))
    return found
