"""Rollouts for the loop: each step asks prompts of the policy as it is, and hands on what it answered.

What a step samples is a function of the parameters, the seed and the step, so a run that was stopped goes on as it
would have. One step behind, a rollout is made before the update that it is not learned from: it is kept in the
checkpoint, because the parameters that sampled it are gone.

Shapes: N prompts, G answers to each, B = N * G rows, T places of a row.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from qwen_jax import rollout
from qwen_jax.batches import Rollout
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.rewards import terms
from qwen_jax.rollout import DECODE_RULES
from qwen_jax.sharding import Layout
from qwen_jax.training import hosts, watch
from qwen_jax.training.lessons import Experience
from qwen_jax.training.watch import WatchConfig

USUAL_SIGNS = WatchConfig()
PAD = 0  # behind the end of a row


@dataclass(frozen=True)
class SamplingConfig:
    """What is asked in a step, and how it is answered."""

    prompts: int = 8  # different ones, in a step
    each: int = 2  # answers to a prompt
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    slots: int = 0  # answers in work at a time: the next takes the place of one that ends; 0: all at once
    behind: bool = False  # learn from what the policy of the step before sampled, while the next rollout is under way

    def __post_init__(self):
        for name in ("prompts", "each", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"sampling.{name} is {getattr(self, name)}; expected at least 1")
        if self.slots < 0:
            raise InputError(f"sampling.slots is {self.slots}; expected 0 (all at once) or more")
        if self.temperature <= 0:
            raise InputError(f"sampling.temperature is {self.temperature}; expected above 0: greedy answers are alike")

    @property
    def rows(self) -> int:
        """How many answers a step learns from."""
        return self.prompts * self.each


class Answered(NamedTuple):
    """Prompts, each repeated for its answers, and the answers: ids [B]; log-probabilities of each token [B] lists."""

    asked: list[list[int]]
    answers: list[list[int]]
    log_probs: list[np.ndarray]
    sampling_log_probs: list[np.ndarray]


class Rate(Protocol):
    """Rewards from the host, such as `questions.Rater`: `metrics` is about the last call."""

    metrics: dict[str, float]

    def __call__(self, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the reward of each answer, [N] float; not finite where nobody could tell."""


class Collector:
    """The batches of `loop.fit`: rollouts of the policy that it was shown last."""

    def __init__(
        self,
        model: QwenConfig,
        prompts: Sequence[Sequence[int]],
        *,
        config: SamplingConfig,
        length: int,
        stop_ids: Sequence[int],
        num_tokens: int,
        layout: Layout,
        seed: int,
        whole: Callable[[Any], dict] = lambda params: params,
        rate: Rate | None = None,
        share: dict[str, int] | None = None,
        mixed: Iterator | None = None,
        signs: WatchConfig = USUAL_SIGNS,
        say: Callable[[str], None] = print,
    ):
        """Checks what can be checked before anything is compiled.

        Args:
          model: the policy.
          prompts: ids each, rendered for an answer; asked in an order of config's seed, all of them before any again.
          config: what is asked and how.
          length: T.
          stop_ids: of these any ends an answer; the first is put where one was cut off.
          num_tokens: of the tokenizer.
          layout: where the policy is trained; it samples on the same mesh by DECODE_RULES.
          seed: of the order and of the answers.
          whole: what is trained -> the policy's parameters: adapters are merged here.
          rate: of this process's rows; None leaves rewards 0.
          share: which rows are this process's, see `sharding.share`; None: all.
          mixed: batches of text rows, one a step; see Experience.
          signs: of reward hacking, that are watched for.
          say: told of them.

        Raises:
          InputError: no prompts, one that leaves no room for an answer, a stop id that is no token, or prompts that
            cannot be shared out.
        """
        self._lists = [list(prompt) for prompt in prompts]
        check_prompts(self._lists, config.max_new_tokens, length, stop_ids, num_tokens)
        self._model, self._config, self._length, self._stops = model, config, length, tuple(stop_ids)
        self._num_tokens, self._seed, self._whole, self._rate = num_tokens, seed, whole, rate
        self._layout = Layout(layout.mesh, DECODE_RULES)
        self._share, self._mixed = share or dict(process_index=0, process_count=1), mixed
        if config.prompts % self._share["process_count"]:
            raise InputError(
                f"sampling.prompts is {config.prompts}; expected a multiple of {self._share['process_count']}, "
                "the shares that processes have of a batch: all answers to a prompt are with one"
            )
        self._signs, self._say, self._watched = signs, say, watch.begin()
        self._index, self._weights, self._waiting, self._repetition = 0, None, None, 0.0

    def see(self, params) -> None:
        """Takes the policy as it is: its weights are laid out for decoding, once for all answers of a step."""
        self._weights = rollout.prepare(self._model, self._whole(params), layout=self._layout)

    def get_state(self) -> dict:
        """Returns the position as JSON, with the rollout that waits, if one does."""
        state = {"next_index": self._index, "watched": self._watched}
        if self._waiting is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **jax.device_get(self._waiting)._asdict())
            state["waiting"] = base64.b64encode(buffer.getvalue()).decode()
        return state | ({"mixed": self._mixed.get_state()} if self._mixed is not None else {})

    def set_state(self, state: dict) -> None:
        """Goes to a position of `get_state`."""
        self._index, self._watched, self._waiting = state["next_index"], state["watched"], None
        if "waiting" in state:
            with np.load(io.BytesIO(base64.b64decode(state["waiting"]))) as kept:
                self._waiting = rollout.Completions(**kept)
        if self._mixed is not None:
            self._mixed.set_state(state["mixed"])

    def __next__(self) -> Experience:
        index = self._index
        self._index += 1
        found = self._sample(index) if self._waiting is None else self._waiting
        # Dispatched before the update of this step, which runs while the answers below are rated.
        self._waiting = self._sample(self._index) if self._config.behind else None
        self._weights = None
        rows = self._mine(self._answered(index, jax.device_get(found)))
        rewards = self._rewards(rows)
        self._repetition = float(np.mean([terms.repeated(ids, watch.NGRAM) for ids in rows.answers]))
        batch = as_rollout(rows, rewards, length=self._length, stop_ids=self._stops, each=self._config.each)
        return Experience(batch, next(self._mixed) if self._mixed is not None else ())

    @property
    def metrics(self) -> dict[str, float]:
        """What the host found of the last rollout."""
        return {"rollout/repetition": self._repetition} | (self._rate.metrics if self._rate is not None else {})

    def watch(self, step: int, figures: dict[str, float]) -> None:
        """Looks for signs of reward hacking in the figures of a finished step.

        The first process decides for all: rewards from the host are of each process's own answers.

        Raises:
          InputError: where one shows that is to stop the run.
        """
        hosts.once(lambda: self._look(step, figures))

    def _look(self, step: int, figures: dict[str, float]) -> None:
        self._watched, told = watch.look(self._watched, {**figures, "step": step}, self._signs)
        for warning in told:
            self._say(f"step {step}: {warning.text}")
        if stopping := [warning for warning in told if warning.stop]:
            raise InputError(
                f"watch.stop has {stopping[0].sign}, which shows at step {step}: {stopping[0].text}; the checkpoints "
                "before it are kept"
            )

    def asked(self, index: int) -> list[list[int]]:
        """Returns the prompts of a step."""
        count = self._config.prompts
        numbers = range(index * count, (index + 1) * count)
        order = lambda epoch: np.random.default_rng([self._seed, epoch]).permutation(len(self._lists))
        orders = {epoch: order(epoch) for epoch in {number // len(self._lists) for number in numbers}}
        places = (orders[number // len(self._lists)][number % len(self._lists)] for number in numbers)
        return [self._lists[place] for place in places]

    def _sample(self, index: int) -> rollout.Completions:
        config = self._config
        return rollout.generate(
            self._model, self._weights, self.asked(index), jax.random.fold_in(jax.random.key(self._seed), index),
            samples=config.each, slots=config.slots or None, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, top_p=config.top_p, stop_ids=self._stops, num_tokens=self._num_tokens,
        )  # fmt: skip

    def _answered(self, index: int, found: rollout.Completions) -> Answered:
        cut = lambda rows: [row[:length] for row, length in zip(rows, found.lengths, strict=True)]
        answers = [ids.tolist() for ids in cut(found.tokens)]
        asked = [prompt for prompt in self.asked(index) for _ in range(self._config.each)]
        return Answered(asked, answers, cut(found.log_probs), cut(found.sampling_log_probs))

    def _mine(self, rows: Answered) -> Answered:
        size = len(rows.asked) // self._share["process_count"]
        start = size * self._share["process_index"]
        return Answered(*(part[start : start + size] for part in rows))

    def _rewards(self, rows: Answered) -> np.ndarray:
        if self._rate is None:
            return np.zeros(len(rows.asked), np.float32)
        rewards = np.asarray(self._rate(rows.asked, rows.answers), np.float32)
        if rewards.shape != (len(rows.asked),):
            raise InputError(
                f"the rewards of {len(rows.asked)} answers have shape {list(rewards.shape)}; expected one number each"
            )
        return rewards


def check_prompts(
    prompts: list[list[int]], max_new_tokens: int, length: int, stop_ids: Sequence[int], num_tokens: int
) -> None:
    """Refuses what cannot be sampled or would not fit.

    Raises:
      InputError: as `Collector`.
    """
    if not prompts:
        raise InputError("there are no prompts; expected at least one")
    for index, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens + 1 > length:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; with sampling.max_new_tokens {max_new_tokens} and an end of "
                f"the turn it does not fit into rows of {length}; expected at most {length - max_new_tokens - 1}, or a "
                "greater length"
            )
    if not stop_ids or not all(0 <= stop < num_tokens for stop in stop_ids):
        raise InputError(f"stop ids are {list(stop_ids)}; expected one or more ids from 0 to {num_tokens - 1}")


def as_rollout(rows: Answered, rewards: np.ndarray, *, length: int, stop_ids: Sequence[int], each: int) -> Rollout:
    """Returns the rows as arrays [B, T].

    An answer whose reward is not finite teaches nothing: it is masked, and counts in its group as the mean of the
    others.
    """
    B = len(rows.asked)
    found = Rollout(
        np.full((B, length), PAD, np.int32), np.zeros((B, length), np.int32),
        *(np.zeros((B, length), np.float32) for _ in range(3)), np.zeros(B, np.int32), filled(rewards, each),
    )  # fmt: skip
    for row, (prompt, answer, log_probs, drawn) in enumerate(zip(*rows, strict=True)):
        ids = [*prompt, *answer, *([] if answer[-1] in stop_ids else stop_ids[:1])]
        sampled = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        found.tokens[row, : len(ids)], found.segment_ids[row, : len(ids)] = ids, 1
        found.mask[row, sampled] = np.isfinite(rewards[row])
        found.log_probs[row, sampled], found.sampling_log_probs[row, sampled] = log_probs, drawn
        found.ends[row] = len(ids) - 1
    return found


def filled(rewards: np.ndarray, each: int) -> np.ndarray:
    """Returns the rewards with those that are not finite replaced by the mean of their group's others, 0 if none is."""
    groups_NG = rewards.reshape(-1, each).astype(np.float32)
    good_NG = np.isfinite(groups_NG)
    sums_N = np.where(good_NG, groups_NG, 0.0).sum(axis=1)
    means_N = sums_N / np.maximum(good_NG.sum(axis=1), 1)
    return np.where(good_NG, groups_NG, means_N[:, None]).reshape(-1).astype(np.float32)
