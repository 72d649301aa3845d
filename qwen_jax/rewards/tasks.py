"""Problems whose answers a program can check, without end: by (task, split, seed) the same ones each time.

A task is named in one string, its options behind it:

  sums most=20 terms=2                     small sums in words, as in `data.made_up`; built in
  gym/chain_sum min_terms=2 max_terms=2    any task of reasoning-gym (Apache-2.0; `pip install 'qwen_jax[rl]'`) with the
                                           fields of its config, scored by its own score function
"""

import ast
import hashlib
import importlib.util
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qwen_jax.errors import InputError
from qwen_jax.rewards import extraction
from qwen_jax.rewards.sample import Reward, Sample

GYM = "gym/"
SPLITS = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}
MISSING = "the task {!r} needs reasoning-gym: pip install 'qwen_jax[rl]'"
PATIENCE = 50  # draws for each problem that is wanted, before a task is said to have no more


class Problem(NamedTuple):
    """A question and what is known of its answer.

    Attributes:
      question: of the user.
      solution: an answer that is right, such as fine-tuning may learn from; empty where the task knows none.
      reference: what scoring needs, for `Sample.reference`; "answer" is the final answer alone, a part of the solution.
    """

    question: str
    solution: str
    reference: dict[str, Any]


def load(task: str, split: str, count: int, *, seed: int = 0) -> list[Problem]:
    """Returns the first `count` different problems of a split; no question is in two splits, whatever the seeds.

    Args:
      task: as above.
      split: one of SPLITS, 80, 10 and 10 in a hundred, by a hash of the question.
      count: how many.
      seed: of the problems.

    Raises:
      InputError: on an unknown task, option or split, a package that is missing, or more problems than the task has.
    """
    if split not in SPLITS:
        raise InputError(f"problems have no split {split!r}; expected one of {', '.join(SPLITS)}")
    found: dict[str, Problem] = {}
    for problem in itertools.islice(_drawn(task, seed), PATIENCE * count + 1000):
        if len(found) == count:
            break
        if _percent(problem.question) in SPLITS[split]:
            found.setdefault(problem.question, problem)
    if len(found) < count:
        raise InputError(
            f"the task {task!r} has {len(found)} different problems in its {split} split; expected {count} or more"
        )
    return list(found.values())


def scorer(task: str) -> Reward | str:
    """Returns what scores final answers: a function, or the name of one that needs a process of its own.

    Raises:
      InputError: it needs a package that is missing.
    """
    if not task.startswith(GYM):
        return score_sums
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(MISSING.format(task))
    return "qwen_jax.rewards.gym:score"


def score_sums(samples: Sequence[Sample]) -> list[float]:
    """1 where the answer is the number that is right, however it is written, 0 elsewhere."""
    right = lambda sample: extraction.number(sample.answer) == extraction.number(str(sample.reference["answer"]))
    return [float(right(sample)) for sample in samples]


def _percent(question: str) -> int:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100


def _drawn(task: str, seed: int) -> Iterator[Problem]:
    if task.startswith(GYM):
        return _of_gym(task, seed)
    name, options = parse(task)
    if name != "sums":
        raise InputError(f"the task {task!r} is unknown; expected sums, or {GYM}NAME for one of reasoning-gym")
    return _sums(task, seed, **{"most": 20, "terms": 2} | options)


def _of_gym(task: str, seed: int) -> Iterator[Problem]:
    try:
        from qwen_jax.rewards import gym
    except ModuleNotFoundError:
        raise InputError(MISSING.format(task)) from None
    # Its item i of seed s is made from s + i: seeds are put far apart, or two of them would have the same items.
    # Some of its tasks take no seed from 2**32 on.
    first = int.from_bytes(hashlib.sha256(f"seed {seed}".encode()).digest()[:4], "big") // 2
    for entry in gym.entries(task, first):
        solution = "" if entry["answer"] is None else str(entry["answer"])
        yield Problem(entry["question"], solution, {"task": task, "entry": entry, "answer": solution})


def parse(task: str) -> tuple[str, dict[str, Any]]:
    """Returns name and options of a task.

    Raises:
      InputError: on words behind the name that are no options.
    """
    name, *words = task.split()
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not equals or not value:
                raise InputError(f"the task {task!r} has {word!r} behind its name; expected OPTION=VALUE") from None
            options[key] = value
    return name, options


def _sums(task: str, seed: int, *, most: int, terms: int, **unknown) -> Iterator[Problem]:
    if unknown or not (isinstance(most, int) and isinstance(terms, int) and most > 0 and terms > 1):
        raise InputError(f"the task {task!r} is not sums most=M terms=T, M 1 or more, T 2 or more")
    for index in itertools.count():
        draw = random.Random(f"{seed} {index}")
        numbers = [draw.randint(0, most) for _ in range(terms)]
        words = [draw.choice(("plus", "minus")) for _ in numbers[1:]]
        steps = list(zip(words, numbers[1:], strict=True))
        total = numbers[0] + sum(number if word == "plus" else -number for word, number in steps)
        text = " ".join([str(numbers[0]), *(f"{word} {number}" for word, number in steps)])
        yield Problem(f"What is {text}?", f"{text} is {total}.", {"answer": str(total)})
