"""Chats and pairs that this file makes up: sums asked, answered, answered wrong.

For smoke runs and tests, which must not need a network.
"""

import numpy as np

from qwen_jax.errors import InputError

SIZES = {"train": 400, "validation": 40, "test": 40}
WORDS = ("plus", "minus", "times")


def load(split: str) -> list[list[dict[str, str]]]:
    """Returns the chats of a split: the same ones each time, no chat in two splits.

    Raises:
      InputError: on a split that there is not.
    """
    if split not in SIZES:
        raise InputError(f"the made-up chats have no split {split!r}; expected one of {', '.join(SIZES)}")
    names = list(SIZES)
    first = sum(SIZES[name] for name in names[: names.index(split)])
    # Question n is a different one for each n: a walk through all pairs of numbers below 50.
    return [_chat(number) for number in range(first, first + SIZES[split])]


def _chat(number: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(number)
    a, b = divmod(number * 37 % 2500, 50)
    messages = []
    for turn in range(int(rng.integers(1, 4))):
        word = WORDS[int(rng.integers(len(WORDS)))]
        answer = {"plus": a + b + turn, "minus": a - b - turn, "times": a * (b + turn)}[word]
        messages.append({"role": "user", "content": f"What is {a} {word} {b + turn}?"})
        messages.append({"role": "assistant", "content": f"{a} {word} {b + turn} is {answer}."})
    return messages


def pairs(split: str) -> list[dict]:
    """Returns pairs for `formats.comparison`: the first question of each chat, its answer, and a wrong one.

    Raises:
      InputError: as `load`.
    """
    chats = [chat[:2] for chat in load(split)]
    return [
        {"prompt": question["content"], "chosen": answer["content"], "rejected": answer["content"][:-1] + "5, or so."}
        for question, answer in chats
    ]
