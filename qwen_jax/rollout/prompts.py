"""Prompts of any number and length into arrays of few shapes, so that few programs are ever compiled.

Shapes: N prompts, B rows, T prompt slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError

SHORTEST = 16  # slots; below it a shorter program would hardly run faster


class Padded(NamedTuple):
    """Left-padded prompts: every row ends at the last slot, where its answer begins.

    Attributes:
      tokens: [B, T] int32, 0 in padding.
      lengths: [B] int32; 0 for the rows that only fill the batch.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def bucket(size: int, smallest: int = 1, multiple: int = 1) -> int:
    """Returns the least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... times `multiple` that is at least `size` and `smallest`.

    Two sizes for each doubling: at most a third of a bucket is padding, and few buckets cover any range.
    """
    units = -(-max(size, smallest) // multiple)
    power = 1 << (units - 1).bit_length()
    return multiple * (power // 4 * 3 if power >= 4 and units <= power // 4 * 3 else power)


def pad(prompts: Sequence[Sequence[int]], *, rows: int = 1, slots: int = 1) -> Padded:
    """Pads prompts on the left to a bucket of lengths, and the batch to a bucket of sizes.

    Args:
      prompts: checked id lists.
      rows: into how many parts the mesh splits the batch.
      slots: into how many parts the mesh splits a prompt.
    """
    B = bucket(len(prompts), multiple=rows)
    T = bucket(max(map(len, prompts)), SHORTEST, multiple=slots)
    padded = Padded(np.zeros((B, T), np.int32), np.zeros(B, np.int32))
    for row, prompt in enumerate(prompts):
        padded.tokens[row, T - len(prompt) :] = prompt
        padded.lengths[row] = len(prompt)
    return padded


def check(
    config: QwenConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    num_tokens: int,
    stop_ids: Sequence[int],
) -> tuple[list[Sequence[int]], list[int]]:
    """Returns the prompts as lists, and the most tokens of each one's answers.

    Raises:
      InputError: no prompts, an empty one, an id that is no token, or prompt and answer longer than the model reads.
    """
    limit = config.max_position_embeddings
    limits = _limits(max_new_tokens, len(prompts), limit)
    _check_number("num_tokens", num_tokens, config.vocab_size)
    _check_ids("stop_ids", stop_ids, num_tokens)
    lists = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompts]
    if not lists:
        raise InputError("prompts is empty; expected at least one list of ids")
    for index, (prompt, new) in enumerate(zip(lists, limits, strict=True)):
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompts[{index}] is {type(prompt).__name__}; expected a list of ids")
        if not prompt:
            raise InputError(f"prompts[{index}] is empty; expected at least one id to answer to")
        _check_ids(f"prompts[{index}]", prompt, num_tokens)
        if len(prompt) + new > limit:
            raise InputError(
                f"prompts[{index}] has {len(prompt)} ids and max_new_tokens is {new}, together {len(prompt) + new}; "
                f"the model reads at most {limit} (max_position_embeddings)"
            )
    return lists, limits


def _limits(max_new_tokens, count: int, most: int) -> list[int]:
    """Returns the most tokens of an answer to each of `count` prompts."""
    if isinstance(max_new_tokens, str) or not hasattr(max_new_tokens, "__len__"):
        _check_number("max_new_tokens", max_new_tokens, most)
        return [max_new_tokens] * count
    if len(max_new_tokens) != count:
        raise InputError(f"max_new_tokens has {len(max_new_tokens)} numbers; expected one, or one for each of {count}")
    for index, value in enumerate(max_new_tokens):
        _check_number(f"max_new_tokens[{index}]", value, most)
    return list(max_new_tokens)


def _check_number(name: str, value, most: int) -> None:
    if not is_whole(value) or not 1 <= value <= most:
        raise InputError(f"{name} is {value!r}; expected a whole number from 1 to {most}")


def _check_ids(name: str, ids: Sequence[int], num_tokens: int) -> None:
    for token in ids:
        if not is_whole(token) or not 0 <= token < num_tokens:
            raise InputError(f"{name} holds the id {token!r}; expected ids from 0 to {num_tokens - 1}")


def is_whole(value) -> bool:
    """Returns whether value is an integer, Python's or numpy's, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
