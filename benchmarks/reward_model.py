"""Reward models beside a bag-of-words logistic regression that learned from the same comparisons of the same sentences.

    python -m benchmarks.reward_model runs/reward runs/reward-smollm2 [--out docs/results/reward_model/figures.json]

Prints JSON: for the regression and for each run the accuracy on the test pairs of human sentence ratings, with its
standard error, by domain, and the calibration error. Needs scikit-learn (pip install 'qwen_jax[bench]').

The regression sees the difference of the two answers' word counts (words, and pairs of neighbouring words), as the
Bradley-Terry model with a linear score does: its strength C is chosen on the validation pairs.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

from experiments import reward_model
from qwen_jax.data import formats, ratings
from qwen_jax.data.preferences import Answers
from qwen_jax.eval import preferences

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def answers(size: int, split: str) -> tuple[list[str], Answers]:
    """The sentences of all domains as they are given to the models, and what they are compared by."""
    texts, values, groups, domains = [], [], [], []
    for domain in reward_model.DOMAINS:
        for record in ratings.lists(domain, split, size=size):
            found = formats.comparison(record, "messages")
            texts += [message["content"] for message in found.answers]
            values += found.values
            groups += [len(domains)] * len(found.answers)
            domains.append(f"ratings-{domain}")
    nothing = types.SimpleNamespace(loss_mask=np.zeros(1))
    documents = [types.SimpleNamespace(loss_mask=np.ones(len(text.split()))) if text else nothing for text in texts]
    return texts, Answers(documents, np.array(values, np.float32), np.array(groups), domains)


def regression(words: int) -> dict:
    """Trains on the lists that `reward_model small` trains on; returns its figures on the test pairs.

    Args:
      words: the longest run of words that is counted as one.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, train = answers(4, "train")
    counted = CountVectorizer(ngram_range=(1, words), min_df=2, binary=True)
    first, second = preferences.pairs(train, least=ratings.MARGIN).T
    bags = counted.fit_transform(texts)
    x = bags[first] - bags[second]
    turned = np.where(np.random.default_rng(0).random(len(first)) < 0.5, 1, -1)  # which of the two stands first
    x = x.multiply(turned[:, None]).tocsr()
    best = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(x, turned)
        for split in ("validation", "test"):
            said, held_out = answers(2, split)
            scores = np.asarray(counted.transform(said) @ model.coef_[0], np.float32)
            found = preferences.figures(preferences.scored(held_out, scores, least=ratings.MARGIN))
            best.setdefault(strength, {})[split] = found
    chosen = max(best, key=lambda strength: best[strength]["validation"]["accuracy"])
    return {"C": chosen, "features": x.shape[1], "comparisons": len(first), **best[chosen]["test"]}


def main() -> None:
    runs = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
    out = None
    if "--out" in sys.argv:
        out = Path(sys.argv[sys.argv.index("--out") + 1])
        runs.remove(out)
    found = {f"bag of words, up to {words}": regression(words) for words in (1, 2)}
    found |= {run.name: json.loads((run / "comparisons.json").read_text()) for run in runs}
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
