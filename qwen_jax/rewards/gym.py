"""The tasks of reasoning-gym. Loading this loads the package, seconds of it: only what asks for such a task does."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import reasoning_gym

from qwen_jax.errors import InputError
from qwen_jax.rewards import tasks
from qwen_jax.rewards.sample import Sample

SIZE = 20_000  # word_ladder takes no more; items are made by index, from there on, too


def entries(task: str, seed: int) -> Iterator[dict]:
    """Returns the items of a task, without end.

    Raises:
      InputError: reasoning-gym has no such task, or the task no such option.
    """
    dataset = _made(task, seed)
    return (dataset[index] for index in itertools.count())


def score(samples: Sequence[Sample]) -> list[float]:
    """What the task itself gives for final answers: 1 for the right one; some tasks give parts of it."""
    return [_made(s.reference["task"], 0).score_answer(s.answer, s.reference["entry"]) for s in samples]


@functools.cache
def _made(task: str, seed: int):
    name, options = tasks.parse(task.removeprefix(tasks.GYM))
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=SIZE, **options)
    except Exception as error:  # whatever its configs assert
        raise InputError(f"reasoning-gym cannot make the task {task!r}: {type(error).__name__}: {error}") from None
