"""Rewards and penalties that need no model: functions of samples, a float for each."""

from collections.abc import Sequence

from qwen_jax.rewards import extraction
from qwen_jax.rewards.sample import Reward, Sample


def well_formed(form: extraction.Form) -> Reward:
    """1 where the final answer stands in the form that was asked for, 0 elsewhere: `extraction.well_formed`."""
    return lambda samples: [float(extraction.well_formed(sample.answer, form)) for sample in samples]


def overlong(longest: int, margin: int) -> Reward:
    """DAPO's soft punishment of answers that come near the limit (arXiv:2503.14476, equation 13).

    With L tokens of answer, L_max = longest and L_cache = margin:
    0 where L <= L_max - L_cache, (L_max - L_cache - L) / L_cache where L_max - L_cache < L <= L_max, -1 where longer.

    Args:
      longest: tokens that an answer may have.
      margin: how many of them cost; 0: only those over the limit.
    """
    free = longest - margin
    return lambda samples: [max(-1.0, min(0.0, (free - len(s.ids)) / max(margin, 1))) for s in samples]


def unfinished(samples: Sequence[Sample]) -> list[float]:
    """-1 where an answer was cut off, 0 where it ended by itself."""
    return [0.0 if sample.finished else -1.0 for sample in samples]


def repetition(size: int) -> Reward:
    """Minus the share of an answer's runs of `size` tokens that it has had before: 0: none, near -1: a loop."""
    return lambda samples: [-repeated(sample.ids, size) for sample in samples]


def repeated(ids: Sequence[int], size: int) -> float:
    """Returns the share of n-grams that occurred before, 1 - distinct / all; 0 where there are none."""
    grams = [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
