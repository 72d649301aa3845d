"""What a policy is asked and what the host knows of the answers: prompts of data sets, or problems a program checks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen_jax import rewards
from qwen_jax.data import preferences, sources
from qwen_jax.errors import InputError
from qwen_jax.rewards import RewardConfig, Sample, tasks
from qwen_jax.tokenizer import Tokenizer, chat

TASK = "task"  # as a data set: the problems of the rewards' task
MODEL = "model"  # among the terms of a reward: the reward model, which is on the mesh and not the host's


class Question(NamedTuple):
    """A prompt's messages, what is known of it, and how the answer has to begin."""

    messages: Sequence[Mapping[str, str]]
    reference: Mapping[str, Any] = {}
    begin: str = ""


def load(dataset: str, split: str, config: RewardConfig, *, most: int, begin: int = 0) -> list[Question]:
    """Returns the first different questions of a split, `most` in all, the same share of each source.

    Args:
      dataset: chats, pairs or lists (`data.sources`), or TASK.
      split: of it.
      config: names the task.
      most: how many.
      begin: words of the data's answer that are given, for the policy to go on from (arXiv:1909.08593, section 3.1).

    Raises:
      InputError: as `rewards.tasks.load` and `data.preferences.prompts`; where there are none.
    """
    if dataset == TASK:
        found = tasks.load(config.task, split, most)
        return [Question([{"role": "user", "content": one.question}], one.reference) for one in found]
    names = sources.names(dataset)
    found = []
    for place, name in enumerate(names):
        share = most // len(names) + (place < most % len(names))
        if begin and share:
            begun = preferences.beginnings(name, split, words=begin, most=share)
            found += [Question(messages, {}, text) for messages, text in begun]
        elif share:
            found += [Question(messages) for messages in preferences.prompts(name, split, most=share)]
    if not found:
        raise InputError(f"{dataset}: there are no prompts in its split {split!r}; expected at least one")
    return found


class Rater:
    """The rewards that need no mesh, as `collecting.Collector` and `eval.policies.Judge` ask for them: ids in."""

    def __init__(self, config: RewardConfig, tok: Tokenizer, template: str, *, say: Callable[[str], None]):
        """Loads what is rewarded.

        Args:
          config: the terms; MODEL among them is not the host's.
          tok: decodes answers.
          template: whose chat format renders prompts.
          say: told what went wrong with a reward.

        Raises:
          InputError: as `rewards.Rewards`.
        """
        self._tok, self._stops = tok, chat.stop_ids(tok)
        self._render = functools.partial(chat.render, generation=template, add_generation_prompt=True)
        self._known: dict[tuple[int, ...], Question] = {}
        terms = tuple(term for term in config.terms if term.partition("=")[0] != MODEL)
        self._rewards = rewards.Rewards(dataclasses.replace(config, terms=terms), say=say) if terms else None
        self.metrics: dict[str, float] = {}

    def render(self, questions: Sequence[Question]) -> list[list[int]]:
        """Returns the prompts' ids, and remembers what they ask."""
        begun = lambda question: self._tok.encode(question.begin) if question.begin else []
        found = [[*self._render(question.messages, self._tok)[0], *begun(question)] for question in questions]
        self._known |= {tuple(ids): question for ids, question in zip(found, questions, strict=True)}
        return found

    def __call__(self, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the reward of each answer, [N] float32; nan where a term failed. `metrics` is of the last call."""
        if self._rewards is None:
            return np.zeros(len(asked), np.float32)
        found = self._rewards.score([
            Sample(known.messages, self._tok.decode(answer, skip_special=True), answer, answer[-1] in self._stops,
                   known.reference)
            for answer, known in zip(answers, (self._known[tuple(ids)] for ids in asked), strict=True)
        ])  # fmt: skip
        self.metrics = found.metrics
        return np.where(found.failed, np.float32(np.nan), found.total)

    def close(self) -> None:
        """Ends the processes of users' functions."""
        if self._rewards is not None:
            self._rewards.close()
