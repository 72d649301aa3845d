"""Reward models beside a bag-of-words logistic regression that learned from the same comparisons of the same sentences.

    python -m benchmarks.reward_model runs/reward runs/reward-smollm2

Prints JSON: for the regression and for each run the accuracy on the test pairs of human sentence ratings, with its
standard error, by domain, and the calibration error. Needs scikit-learn (pip install 'qwen_jax[bench]').

The regression sees the difference of the two answers' word counts (words, and pairs of neighbouring words), as the
Bradley-Terry model with a linear score does: its strength C is chosen on the validation pairs.
"""

import argparse
import json
import types
from pathlib import Path

import numpy as np

from qwen_jax.data import formats, ratings
from qwen_jax.data.preferences import Answers
from qwen_jax.eval import preferences

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def answers(size: int, split: str, most: int | None = None) -> tuple[list[str], Answers]:
    """The sentences of all domains (`most` lists each) as the models get them, and what they are compared by."""
    texts, values, groups, domains = [], [], [], []
    for domain in ratings.FILES:
        for record in ratings.lists(domain, split, size=size)[:most]:
            found = formats.comparison(record, "messages")
            texts += [message["content"] for message in found.answers]
            values += found.values
            groups += [len(domains)] * len(found.answers)
            domains.append(f"ratings-{domain}")
    nothing = types.SimpleNamespace(loss_mask=np.zeros(1))
    documents = [types.SimpleNamespace(loss_mask=np.ones(len(text.split()))) if text else nothing for text in texts]
    return texts, Answers(documents, np.array(values, np.float32), np.array(groups), domains)


def regression(words: int, most: int | None) -> dict:
    """Trains on the lists that `reward_model small` trains on; returns its figures on the test pairs.

    Args:
      words: the longest run of words that is counted as one.
      most: test pairs of each domain; all if None.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, train = answers(4, "train")
    counted = CountVectorizer(ngram_range=(1, words), min_df=2, binary=True)
    first, second = preferences.pairs(train, least=ratings.MARGIN).T
    bags = counted.fit_transform(texts)
    turned = np.where(np.random.default_rng(0).random(len(first)) < 0.5, 1, -1)  # which of the two stands first
    x = (bags[first] - bags[second]).multiply(turned[:, None]).tocsr()

    def judged(model, split: str, most: int | None) -> dict:
        said, held_out = answers(2, split, most)
        scores = np.asarray(counted.transform(said) @ model.coef_[0], np.float32)
        return preferences.figures(preferences.scored(held_out, scores, least=ratings.MARGIN))

    fitted = [LogisticRegression(C=c, fit_intercept=False, max_iter=1000).fit(x, turned) for c in STRENGTHS]
    best = max(fitted, key=lambda model: judged(model, "validation", None)["accuracy"])
    return {"C": best.C, "features": x.shape[1], "comparisons": len(first), **judged(best, "test", most)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument(
        "--most", type=int, help="test pairs of each domain, the run's --test-prompts; all if not given"
    )
    arguments = parser.parse_args()
    found = {f"bag of words, up to {words}": regression(words, arguments.most) for words in (1, 2)}
    found |= {run.name: json.loads((run / "comparisons.json").read_text()) for run in arguments.runs}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
