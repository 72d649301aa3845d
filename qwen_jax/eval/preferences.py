"""How well scores agree with what people prefer: accuracy by margin and domain, calibration, length bias, pictures.

Shapes: n answers, P pairs of them.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from qwen_jax.data.preferences import Answers
from qwen_jax.files import write_whole
from qwen_jax.training import hosts
from qwen_jax.training.page import Block, Picture, Table, Text

MARGINS = (1.0, 2.0, 3.0, 4.0)  # where bins of the human margin begin


class Scored(NamedTuple):
    """Pairs of answers, the preferred one first, and what a model made of them.

    Attributes:
      chosen, rejected: [P] scores; sigmoid(chosen - rejected) is the model's probability of the preference.
      margins: [P] by how much people preferred the first.
      domains: [P] names.
      scores, values, lengths: [n] of every answer once: the model's score, what people think of it, its tokens.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    margins: np.ndarray
    domains: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    lengths: np.ndarray


def pairs(answers: Answers, *, least: float = 0.0) -> np.ndarray:
    """Returns [P, 2] pairs of answers to one prompt, the preferred first: `objectives.reward.pairs` on the host."""
    found = []
    starts = np.flatnonzero(np.diff(answers.groups, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(answers.groups)], strict=True):
        lead = answers.values[start:stop, None] - answers.values[None, start:stop]
        found.append(np.argwhere((lead > 0) & (lead >= least)) + start)
    return np.concatenate(found)


def scored(answers: Answers, scores: np.ndarray, *, least: float = 0.0) -> Scored:
    """Puts the scores of answers, [n], beside what people think of them."""
    first, second = pairs(answers, least=least).T
    lengths = np.array([int(document.loss_mask.sum()) for document in answers.documents])
    domains = np.array(answers.domains)[answers.groups[first]]
    margins = answers.values[first] - answers.values[second]
    return Scored(scores[first], scores[second], margins, domains, scores, answers.values, lengths)


def figures(found: Scored) -> dict:
    """Returns what there is to say in numbers, as JSON.

    accuracy and nll (nats) of the pairs, by domain and by margin, with their numbers; ece, see `reliability`; the
    correlation of a score with the answer's length in tokens, beside that of people's own ratings with it; mean and
    standard deviation of the scores.
    """
    lead = found.chosen - found.rejected
    right = lead > 0
    by = lambda masks: {name: _counted(right, mask) for name, mask in masks.items() if mask.any()}
    edges = [*MARGINS, np.inf]
    margins = {f"{low:g} to {high:g}": (found.margins >= low) & (found.margins < high)
               for low, high in zip(edges[:-1], edges[1:], strict=True)}  # fmt: skip
    return {
        **_counted(right, np.ones_like(right)),
        "nll": float(np.mean(np.logaddexp(0, -lead))),
        "by_domain": by({str(name): found.domains == name for name in np.unique(found.domains)}),
        "by_margin": by(margins),
        "ece": reliability(lead)[0],
        "length_correlation": correlation(found.scores, found.lengths),
        "length_correlation_of_people": correlation(found.values, found.lengths),
        "score_mean": float(found.scores.mean()),
        "score_std": float(found.scores.std()),
    }


def _counted(right: np.ndarray, mask: np.ndarray) -> dict:
    """Accuracy of the pairs of a mask, its standard error, and how many they are."""
    count, share = int(mask.sum()), float(right[mask].mean())
    return {"accuracy": share, "error": float(np.sqrt(share * (1 - share) / count)), "pairs": count}


def reliability(lead: np.ndarray, bins: int = 10) -> tuple[float, np.ndarray]:
    """Returns the expected calibration error, and [bins, 3] confidence, accuracy, share of each bin (nan where empty).

    The model's confidence in its own choice, sigmoid(|lead|), is 0.5 to 1; bins are of equal width, and the error is
    the mean over pairs of |confidence - accuracy| of the bin (Guo et al., arXiv:1706.04599, equation 3).

    Args:
      lead: [P] score of the preferred answer less that of the other.
      bins: how many.
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(lead).astype(np.float64))), lead > 0
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    table = np.full((bins, 3), np.nan)
    for bin in range(bins):
        mine = place == bin
        if mine.any():
            table[bin] = confidence[mine].mean(), right[mine].mean(), mine.mean()
    return float(np.nansum(np.abs(table[:, 0] - table[:, 1]) * table[:, 2])), table


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    if np.std(x) == 0 or np.std(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def write(folder: pathlib.Path, found: Scored, *, of: str) -> list[Block]:
    """Writes comparisons.json and plots/comparisons.png into a run's folder; returns what a report shows of them."""
    said = figures(found)
    hosts.once(lambda: write_whole(folder / "comparisons.json", json.dumps(said, indent=2) + "\n"))
    hosts.once(lambda: plot(folder / "plots" / "comparisons.png", found))
    share = lambda counted: [f"{counted['accuracy']:.3f} ± {counted['error']:.3f}", f"{counted['pairs']:,}"]
    rows = [["all", *share(said)]]
    rows += [[name, *share(counted)] for name, counted in said["by_domain"].items()]
    rows += [[f"margin {name}", *share(counted)] for name, counted in said["by_margin"].items()]
    return [
        Text("Agreement with people", 2),
        Text(f"On {of}. Accuracy is the share of pairs that are ranked as people do, ± its standard error."),
        Table(["pairs", "accuracy", "how many"], rows),
        Text(
            f"Loss {said['nll']:.4f} nats per comparison (knowing nothing costs 0.6931). Expected calibration error "
            f"{said['ece']:.3f}. Scores are {said['score_mean']:.2f} ± {said['score_std']:.2f}. Their correlation with "
            f"an answer's length is {said['length_correlation']:.3f}; that of people's own judgement is "
            f"{said['length_correlation_of_people']:.3f}."
        ),
        Picture("plots/comparisons.png", "agreement with people"),
    ]


def plot(path: pathlib.Path, found: Scored) -> None:
    """Draws reliability, the scores of preferred and other answers, accuracy by margin, and score against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    lead = found.chosen - found.rejected
    error, table = reliability(lead)
    a.plot([0.5, 1], [0.5, 1], ls=":", color="grey")
    a.plot(table[:, 0], table[:, 1], marker="o")
    a.set(xlabel="confidence", ylabel="share of pairs ranked as people do", title=f"calibration error {error:.3f}")
    both = np.concatenate([found.chosen, found.rejected])
    edges = np.histogram_bin_edges(both, 40)
    b.hist(found.chosen, edges, alpha=0.6, label="preferred")
    b.hist(found.rejected, edges, alpha=0.6, label="other")
    b.set(xlabel="score", ylabel="answers", title="scores")
    b.legend()
    for name in np.unique(found.domains):
        shown = [(low, (lead > 0)[mask].mean()) for low, mask in _bins(found, name) if mask.sum() >= 10]
        c.plot(*zip(*shown, strict=True), marker="o", label=name) if shown else None
    c.set(xlabel="people's margin, from", ylabel="accuracy", title="accuracy by margin")
    if c.lines:
        c.legend()
    d.scatter(found.lengths, found.scores, s=3, alpha=0.4)
    d.set(xlabel="tokens of the answer", ylabel="score", title=f"r = {correlation(found.scores, found.lengths):.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bins(found: Scored, domain: str):
    for low, high in zip(MARGINS, [*MARGINS[1:], np.inf], strict=True):
        yield low, (found.domains == domain) & (found.margins >= low) & (found.margins < high)
