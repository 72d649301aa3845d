"""Calling a reward function that may raise, lie about its length, or return no number: samples fail, the run does not.

A function is called with all samples of a batch. Where that call fails as a whole, it is called with one at a time, so
that only those samples fail that make it fail.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qwen_jax.errors import InputError
from qwen_jax.rewards.sample import Reward, Sample


class Trouble(NamedTuple):
    """What was wrong with a reward.

    Attributes:
      kind: "raised" by the function; "timeout"; "died": its process did; "length": not one value for each sample;
        "number": a value is none; "finite": nan or infinite.
      text: what exactly, in a few words.
    """

    kind: str
    text: str


def load(path: str) -> Reward:
    """Returns the function that "package.module:function" names.

    Raises:
      InputError: where there is none, or its module raises.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise InputError(f"the reward function {path!r} is not named as package.module:function")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a user's module does when it is loaded
        raise InputError(f"the reward function {path!r} cannot be loaded: {told(error)}") from None
    if not callable(function):
        raise InputError(f"the reward function {path!r}: {module} has no function {name!r}")
    return function


def told(error: BaseException) -> str:
    """Returns an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def call(function: Reward, samples: Sequence[Sample]) -> list[float | Trouble] | Trouble:
    """Calls once; returns what each sample got, or the trouble of the whole call."""
    try:
        found = function(samples)
        if isinstance(found, str | bytes | Mapping):
            return Trouble("length", f"returned a {type(found).__name__}, expected {len(samples)} numbers")
        values = list(found)
    except (Exception, SystemExit) as error:
        return Trouble("raised", told(error))
    if len(values) != len(samples):
        return Trouble("length", f"returned {len(values)} values for {len(samples)} samples")
    return [_number(value) for value in values]


def _number(value) -> float | Trouble:
    if isinstance(value, str | bytes):
        return Trouble("number", f"returned {value[:40]!r}")
    try:
        number = float(value)
    except Exception:  # of whatever object this is
        return Trouble("number", f"returned a {type(value).__name__}")
    return number if math.isfinite(number) else Trouble("finite", f"returned {number}")


Caller = Callable[[Sequence[Sample]], list[float | Trouble] | Trouble]


def each(samples: Sequence[Sample], whole: Caller, alone: Caller) -> list[float | Trouble]:
    """Returns a value or a trouble for each sample: of one call, or, where it fails, of a call for each.

    Args:
      samples: any number.
      whole: calls with all of them.
      alone: calls with one.
    """
    if not samples:
        return []
    found = whole(samples)
    if not isinstance(found, Trouble):
        return found
    if len(samples) == 1:
        return [found]
    singles = (alone([sample]) for sample in samples)
    return [one if isinstance(one, Trouble) else one[0] for one in singles]
