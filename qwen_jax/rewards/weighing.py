"""Several rewards, weighed and summed; each reported for itself, and what went wrong counted.

Shapes: N samples.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.rewards import calling, extraction, tasks, terms
from qwen_jax.rewards.calling import Trouble
from qwen_jax.rewards.outside import Outside
from qwen_jax.rewards.sample import Reward, Sample

NAMES = ("answer", "format", "length", "repetition", "unfinished")


@dataclass(frozen=True)
class RewardConfig:
    """What answers are rewarded for.

    A term is NAME=WEIGHT (a weight of 1 may be left out). NAME is one of NAMES, a name that the experiment gives
    (a reward model is "model"), or package.module:function of the user's own: plain Python, a list of `Sample` in, as
    many numbers out.
    """

    terms: tuple[str, ...] = ("answer",)
    task: str = "sums"  # of the "answer" term: `rewards.tasks`
    form: extraction.Form = "number"  # where in an answer the final answer stands
    longest: int = 0  # of the "length" term: tokens that an answer may have
    margin: int = 0  # of the "length" term: how many of them cost
    ngram: int = 4  # of the "repetition" term
    timeout: float = 10.0  # seconds for a batch, of each of the user's functions
    fallback: float = 0.0  # what a term gives where it failed

    def __post_init__(self):
        if self.timeout <= 0 or not math.isfinite(self.fallback) or self.ngram < 1:
            raise InputError(
                f"reward.timeout {self.timeout}, reward.fallback {self.fallback}, reward.ngram {self.ngram}; expected "
                "seconds above 0, a finite number, 1 or more"
            )
        self.weights()

    def weights(self) -> dict[str, float]:
        """Returns name -> weight of the terms.

        Raises:
          InputError: none, one twice, or a weight that is no finite number.
        """
        found: dict[str, float] = {}
        for term in self.terms:
            name, _, weight = term.partition("=")
            try:
                value = float(weight) if weight else 1.0
            except ValueError:
                value = math.nan
            if not name or not math.isfinite(value):
                raise InputError(f"reward.terms has {term!r}; expected NAME=WEIGHT")
            if name in found or name in ("mean", "std", "errors"):
                raise InputError(
                    f"reward.terms has {name!r} {'twice' if name in found else 'which a metric is called'}"
                )
            found[name] = value
        if not found:
            raise InputError(f"reward.terms is empty; expected some of {', '.join(NAMES)}, or package.module:function")
        return found


class Scores(NamedTuple):
    """What samples got.

    Attributes:
      total: [N] float32, the weighted sum of the terms.
      parts: name -> [N] float32 of each term, not weighted, the fallback where it failed.
      failed: [N] bool, some term failed; a run may leave such a sample out of its loss.
      metrics: "reward/mean", "reward/std", "reward/NAME" of each term, "reward/errors": how many samples failed, and
        "reward/errors/KIND" of each `calling.Trouble` there was.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray
    metrics: dict[str, float]


class Rewards:
    """The terms of a config, ready to be asked. What goes wrong is never fatal: it is counted, and said once a kind."""

    def __init__(
        self, config: RewardConfig, more: Mapping[str, Reward] | None = None, *, say: Callable[[str], None] = print
    ):
        """Loads users' functions, each in a process of its own.

        Args:
          config: what is rewarded.
          more: name -> function of this process, such as a reward model's; trusted not to hang.
          say: told what went wrong.

        Raises:
          InputError: an unknown term, or a function that cannot be loaded.
        """
        self.config, self._say, self._said = config, say, set()
        self._terms = {name: self._term(name, more or {}) for name in config.weights()}

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Returns what each sample is worth."""
        size, weights = len(samples), self.config.weights()
        parts, failed, kinds = {}, np.zeros(size, bool), collections.Counter()
        for name, function in self._terms.items():
            found = function(samples)
            bad = {place: one for place, one in enumerate(found) if isinstance(one, Trouble)}
            values = [self.config.fallback if place in bad else one for place, one in enumerate(found)]
            parts[name] = np.array(values, np.float32)
            failed[list(bad)] = True
            kinds.update(trouble.kind for trouble in bad.values())
            self._tell(name, size, bad.values())
        total = np.zeros(size, np.float32) + sum(np.float32(weights[name]) * part for name, part in parts.items())
        metrics = {"reward/mean": _mean(total), "reward/std": float(total.std()) if size else 0.0}
        metrics |= {f"reward/{name.replace(':', '.')}": _mean(part) for name, part in parts.items()}
        metrics |= {"reward/errors": float(failed.sum())}
        return Scores(total, parts, failed, metrics | {f"reward/errors/{kind}": float(n) for kind, n in kinds.items()})

    def close(self) -> None:
        """Ends the processes of users' functions."""
        for function in self._terms.values():
            getattr(function, "close", lambda: None)()

    def _tell(self, name: str, size: int, troubles: Sequence[Trouble]) -> None:
        counts = collections.Counter(trouble.kind for trouble in troubles)
        for kind, count in counts.items():
            if (name, kind) not in self._said:
                self._said.add((name, kind))
                text = next(trouble.text for trouble in troubles if trouble.kind == kind)
                self._say(
                    f"reward {name} failed on {count} of {size} samples ({kind}: {text}); they get "
                    f"{self.config.fallback:g}; more of this kind are only counted, in reward/errors/{kind}"
                )

    def _term(self, name: str, more: Mapping[str, Reward]) -> Callable[[Sequence[Sample]], list[float | Trouble]]:
        config = self.config
        if name in more:
            return _here(more[name])
        if name == "answer":
            return _Answer(config, self._function(tasks.scorer(config.task)))
        if name == "format":
            return _here(terms.well_formed(config.form))
        if name == "length":
            if not 0 <= config.margin <= config.longest or not config.longest:
                raise InputError(
                    f"reward.terms has length, with reward.longest {config.longest} and reward.margin {config.margin}; "
                    "expected the most tokens of an answer, and how many of them cost"
                )
            return _here(terms.overlong(config.longest, config.margin))
        if name == "repetition":
            return _here(terms.repetition(config.ngram))
        if name == "unfinished":
            return _here(terms.unfinished)
        if ":" not in name:
            raise InputError(
                f"reward.terms has {name!r}; expected one of {', '.join([*NAMES, *more])}, or package.module:function"
            )
        return self._function(name)

    def _function(self, function: Reward | str) -> Callable[[Sequence[Sample]], list[float | Trouble]]:
        return Outside(function, timeout=self.config.timeout) if isinstance(function, str) else _here(function)


class _Answer:
    """Whether final answers are right: where there is none, that is 0, and nobody is asked."""

    def __init__(self, config: RewardConfig, judge):
        self._form, self._judge = config.form, judge
        self.close = getattr(judge, "close", lambda: None)

    def __call__(self, samples: Sequence[Sample]) -> list[float | Trouble]:
        final = [extraction.extract(sample.answer, self._form) for sample in samples]
        asked = [s._replace(answer=text) for s, text in zip(samples, final, strict=True) if text is not None]
        found = iter(self._judge(asked))
        return [0.0 if text is None else next(found) for text in final]


def _here(function: Reward):
    """A function of this process, as `Outside` is called."""
    caller = functools.partial(calling.call, function)
    return lambda samples: calling.each(list(samples), caller, caller)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
