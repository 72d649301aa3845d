"""How the next token is chosen: what a user asks for, checked, and split into what is compiled in and what is not.

Shapes: B batch, V vocabulary, C candidates.
"""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.ops import sampling

COLDEST = 1e-6  # below, float32 tells no two logits apart that it did not already call equal or certain


class Knobs(NamedTuple):
    """Values a compiled program takes as arguments: turning one compiles nothing. Scalars float32, num_tokens int32."""

    num_tokens: jax.Array | int
    temperature: jax.Array | float
    top_p: jax.Array | float
    min_p: jax.Array | float
    repetition_penalty: jax.Array | float
    presence_penalty: jax.Array | float


@dataclass(frozen=True)
class Plan:
    """Which steps a program has at all. A filter that is off costs nothing.

    Attributes:
      padded: whether ids from knobs.num_tokens on are never chosen.
      greedy: the likeliest token instead of a draw; the filters then mean nothing and are off.
      top_k: how many candidates; 0 for the whole vocabulary.
      top_p, min_p, repetition, presence: whether these are on.
    """

    padded: bool
    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    repetition: bool
    presence: bool


def plan(
    *,
    num_tokens: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
) -> tuple[Plan, Knobs]:
    """Checks the values of a request.

    Raises:
      InputError: a value out of range; the message names it and the range.
    """
    ranges = (
        ("temperature", temperature, lambda x: x == 0 or x >= COLDEST, f"0 (greedy), or {COLDEST} and more"),
        ("top_k", top_k, lambda x: x >= 0 and x == int(x), "a whole number, 0 (off) or more"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1 (off)"),
        ("min_p", min_p, lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
        ("repetition_penalty", repetition_penalty, lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000; 1 is off"),
        ("presence_penalty", presence_penalty, lambda x: abs(x) <= 1e4, "from -10000 to 10000; 0 is off"),
    )
    for name, value, valid, expected in ranges:
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or not valid(value):
            raise InputError(f"{name} is {value!r}; expected {expected}")
    draws = temperature > 0
    steps = Plan(
        padded=num_tokens < vocab_size,
        greedy=not draws,
        top_k=int(top_k) if draws and top_k < vocab_size else 0,
        top_p=draws and top_p < 1,
        min_p=draws and min_p > 0,
        repetition=repetition_penalty != 1,
        presence=presence_penalty != 0,
    )
    values = (temperature, top_p, min_p, repetition_penalty, presence_penalty)
    return steps, Knobs(np.int32(num_tokens), *map(np.float32, values))


class Seen(NamedTuple):
    """Which tokens the penalties fall on; None where a penalty is off.

    Attributes:
      ever: [B, V] bool, in prompt or answer, for the repetition penalty.
      said: [B, V] bool, in the answer, for the presence penalty.
    """

    ever: jax.Array | None
    said: jax.Array | None

    @classmethod
    def of_prompts(cls, steps: Plan, tokens_BT: jax.Array, real_BT: jax.Array, vocab_size: int) -> "Seen":
        """Returns what is seen before the first token of the answer; `real_BT` is False in padding."""
        none_BV = jnp.zeros((tokens_BT.shape[0], vocab_size), bool)
        rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
        return cls(
            none_BV.at[rows_B1, tokens_BT].max(real_BT) if steps.repetition else None,
            none_BV if steps.presence else None,
        )

    def add(self, token_B: jax.Array) -> "Seen":
        """Returns it with one more token of each answer."""
        rows_B = jnp.arange(token_B.shape[0])
        return Seen(*(None if seen is None else seen.at[rows_B, token_B].set(True) for seen in self))


def choose(
    logits_BV: jax.Array, seen: Seen, keys_B: jax.Array, steps: Plan, knobs: Knobs
) -> tuple[jax.Array, jax.Array]:
    """Chooses one token a row.

    The order is the usual one: penalties, temperature, top-k, top-p, min-p.

    Returns:
      token_B int32, and [B] float32: its log-probability in the distribution it was drawn from (0 if greedy).
    """
    if steps.repetition:
        logits_BV = sampling.repetition_penalty(logits_BV, seen.ever, knobs.repetition_penalty)
    if steps.presence:
        logits_BV = sampling.presence_penalty(logits_BV, seen.said, knobs.presence_penalty)
    if steps.padded:
        logits_BV = sampling.only_first(logits_BV, knobs.num_tokens)
    if steps.greedy:
        return sampling.likeliest(logits_BV), jnp.zeros(logits_BV.shape[0], jnp.float32)
    logits_BC, ids_BC = sampling.temperature(logits_BV, knobs.temperature), None
    if steps.top_k:
        logits_BC, ids_BC = sampling.top_k(logits_BC, steps.top_k)
    if steps.top_p:
        logits_BC = sampling.top_p(logits_BC, knobs.top_p)
    if steps.min_p:
        logits_BC = sampling.min_p(logits_BC, knobs.min_p)
    index_B = sampling.draw(logits_BC, keys_B)
    token_B = index_B if ids_BC is None else jnp.take_along_axis(ids_BC, index_B[:, None], axis=1)[:, 0]
    return token_B, sampling.log_probs_of(logits_BC, index_B)
