"""Signs that a policy has found a way around its reward, or that its updates go wrong, in a run's own metrics.

What a metric was at first (the mean of its first `window` figures) is compared with what it is now (that of the last).
Nothing here acts: a run prints the warnings, and may stop. `figures` makes the metrics that are watched.

Shapes: N prompts, G answers to each, in the order of prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.rewards import terms

NGRAM = 4  # tokens of a run that counts as repeated


class Sign(NamedTuple):
    """What is looked at: a metric, when it is a sign (now, at first, the config's bound), and what to say of it."""

    metric: str
    shows: Callable[[float, float, float], bool]
    text: str


_over = lambda now, first, bound: now > bound
_risen = lambda now, first, bound: now - first > bound
_grown = lambda now, first, bound: now > bound * first
_shrunk = lambda now, first, bound: now < bound * first

SIGNS = {
    "longer": Sign(
        "rollout/length", _grown, "answers have {now:.0f} tokens, {first:.0f} at first: the reward may pay for length"
    ),
    "shorter": Sign(
        "rollout/length", _shrunk, "answers have {now:.0f} tokens, {first:.0f} at first: saying little may be safest"
    ),
    "repetition": Sign(
        "rollout/repetition", _risen,
        "{now:.0%} of an answer's n-grams repeat it, {first:.0%} at first: the reward may pay for loops",
    ),
    "unfinished": Sign(
        "rollout/unfinished", _risen,
        "{now:.0%} of the answers are cut off, {first:.0%} at first: allow more tokens, or punish length",
    ),
    "entropy": Sign(
        "rollout/entropy", _shrunk,
        "the entropy is {now:.3g} nats a token, {first:.3g} at first: the policy stops exploring; raise the entropy "
        "bonus or clip_high, or lower the learning rate",
    ),
    "kl": Sign(
        "rollout/kl", _over,
        "the policy is {now:.3g} nats an answer from its reference, over {bound:g}: what the reward model says there "
        "may mean nothing; raise kl_coef or stop",
    ),
    "clip": Sign(
        "policy/clip_fraction", _over,
        "{now:.0%} of the tokens are held by the clip: updates go too far; lower the learning rate or the epochs",
    ),
    "flat": Sign(
        "rollout/flat_groups", _over,
        "in {now:.0%} of the groups all answers have one reward and teach nothing: change the prompts' difficulty",
    ),
    "errors": Sign(
        "rollout/reward_errors", _over, "{now:.0%} of the samples have no reward of their own: see reward/errors"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WatchConfig:
    """From where on a figure is a sign; 0 looks away."""

    window: int = 10  # rows of metrics that are averaged, at first and now
    longer: float = 2.0  # over so many times the length of the first answers
    shorter: float = 0.33  # under so many times that
    repetition: float = 0.3  # so much more of an answer's n-grams had occurred in it
    unfinished: float = 0.5  # so many more of the answers are cut off
    entropy: float = 0.2  # under so many times the first entropy
    kl: float = 20.0  # nats an answer
    clip: float = 0.4  # share of the tokens that the clip holds
    flat: float = 0.9  # share of the groups with equal rewards
    errors: float = 0.1  # share of the samples whose reward failed
    stop: tuple[str, ...] = ()  # signs that stop the run; "all" for any

    def __post_init__(self):
        if self.window < 1:
            raise InputError(f"watch.window is {self.window}; expected 1 or more")
        if unknown := sorted(set(self.stop) - {"all", *SIGNS}):
            raise InputError(f"watch.stop has {unknown[0]!r}; expected all, or some of {', '.join(SIGNS)}")


class Warning(NamedTuple):
    """A sign that has begun to show.

    Attributes:
      sign: of SIGNS.
      step: at which it began.
      text: what was seen, and what it may mean.
      stop: the config says to stop for it.
    """

    sign: str
    step: int
    text: str
    stop: bool


def begin() -> dict[str, Any]:
    """Returns what is remembered at the start: plain JSON, for checkpoints."""
    return {"first": {}, "last": {}, "shown": []}


def look(
    state: dict[str, Any], row: Mapping[str, float], config: WatchConfig = WatchConfig()
) -> tuple[dict[str, Any], list[Warning]]:
    """Takes in a row of metrics, {"step": n, name: value}; returns what to remember, and the signs that are new.

    A sign is told once as long as it shows. What a row lacks is passed over, and what is not finite, for which the loop
    stops anyhow. Nothing shows before a window is full.
    """
    first, last = ({name: list(values) for name, values in state[key].items()} for key in ("first", "last"))
    for name in {sign.metric for sign in SIGNS.values()}:
        if math.isfinite(value := row.get(name, math.nan)):
            if len(first.setdefault(name, [])) < config.window:
                first[name].append(float(value))
            last[name] = [*last.get(name, []), float(value)][-config.window :]
    shown, told = [], []
    for name, sign in SIGNS.items():
        bound = getattr(config, name)
        if not bound or len(last.get(sign.metric, ())) < config.window:
            continue
        now, was = (math.fsum(kept[sign.metric]) / config.window for kept in (last, first))
        if sign.shows(now, was, bound):
            shown.append(name)
            if name not in state["shown"]:
                text = sign.text.format(now=now, first=was, bound=bound)
                told.append(Warning(name, int(row.get("step", 0)), text, not {"all", name}.isdisjoint(config.stop)))
    return {"first": first, "last": last, "shown": shown}, told


def over(rows: Sequence[Mapping[str, float]], config: WatchConfig = WatchConfig()) -> list[Warning]:
    """Returns all signs of a history, such as `metrics.read` gives."""
    state, told = begin(), []
    for row in rows:
        state, some = look(state, row, config)
        told += some
    return told


def figures(
    answers: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    rewards: np.ndarray,
    failed: Sequence[bool] | None = None,
    log_probs: np.ndarray | None = None,
    kl: np.ndarray | None = None,
) -> dict[str, float]:
    """Returns the metrics of one rollout that are watched, "policy/clip_fraction" apart, which is the update's.

    Args:
      answers: ids of N * G answers.
      finished: which ended by themselves.
      rewards: [N, G].
      failed: whose reward failed (`Scores.failed`).
      log_probs: [N * G] sums over each answer's tokens under the policy that sampled them at temperature 1: the
        entropy's estimate is less their mean over all tokens.
      kl: [N * G] sums of log(policy / reference).
    """
    lengths = np.array([len(ids) for ids in answers])
    found = {
        "rollout/length": float(lengths.mean()),
        "rollout/repetition": float(np.mean([terms.repeated(ids, NGRAM) for ids in answers])),
        "rollout/unfinished": float(1 - np.mean(finished)),
        "rollout/flat_groups": float(np.mean(np.ptp(rewards, axis=1) == 0)),
    }
    if failed is not None:
        found["rollout/reward_errors"] = float(np.mean(failed))
    if log_probs is not None:
        found["rollout/entropy"] = float(-np.sum(log_probs) / lengths.sum())
    if kl is not None:
        found["rollout/kl"] = float(np.mean(kl))
    return found
