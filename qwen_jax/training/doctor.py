"""The doctor: before the first update, what has to hold in a reinforcement learning run, and cannot be seen elsewhere.

A rollout of the untrained policy is computed as the update computes it, and what has to be equal is compared. What
fails stops the run with a sentence, where it would have been a NaN, or nothing at all, at step 100.

Shapes: B answers, T places; place t holds figures of the token at t, as in `objectives.ppo`. P held-out pairs.
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.training import hosts
from qwen_jax.training.page import Block, Table, Text

FILE = "doctor.json"
NAMES = (
    "stop ids", "padding", "vocabulary", "ends", "ratio", "rollout", "sampling", "kl", "score", "rewards", "advantages",
    "values", "reward model",
)  # fmt: skip
Array = Any  # numpy, or jax on one process


@dataclass(frozen=True)
class DoctorConfig:
    """What is still healthy."""

    ratio: float = 1e-5  # the largest |policy / old policy - 1|; computed twice by one program, it is 0
    kl: float = 1e-5  # nats a token, of the policy from its reference
    log_probs: float = 1e-3  # nats, a token's in the rollout and in training; in bfloat16 12 layers differed by 0.07
    ended: float = 0.05  # the least share of answers that end with a stop id
    centre: float = 0.1  # of standard deviations that advantages which were centred may be off 0
    value_error: float = 10.0  # root mean square of value - return, in that of the returns
    accuracy: float = 0.55  # of the reward model on held-out pairs
    tolerated: tuple[str, ...] = ()  # names of checks whose failure is told and does not stop the run

    def __post_init__(self):
        if unknown := set(self.tolerated) - set(NAMES):
            raise InputError(f"doctor.tolerated has {sorted(unknown)[0]!r}; expected some of {', '.join(NAMES)}")


class Evidence(NamedTuple):
    """What the doctor looks at; what is None is not examined.

    Attributes:
      tokens: [B, T] int, prompts, answers and padding.
      mask: [B, T], not 0 at the answers' tokens, the stop id among them.
      stop_ids, pad_id, vocab_size: ids that end an answer, the one that fills rows, and how many the tokenizer has.
      log_probs: [B, T] of the tokens, as the update's forward pass gives them.
      old_log_probs: [B, T], those that the update divides by.
      rollout_log_probs: [B, T], those of sampling, under the policy itself (`Completions.log_probs`).
      sampling_log_probs: [B, T], in the distribution that tokens were drawn from, temperature and filters in force.
      reference_log_probs: [B, T]; None where the policy does not begin as the reference, or no longer is it.
      score_tokens: [B] int, the token at which the reward model's score was read.
      rewards: [B] of whole answers.
      advantages: [B] or [B, T].
      centred: advantages were centred: whitened, or less the mean of their group.
      values, returns: [B, T].
      chosen, rejected: [P] the reward model's scores of held-out pairs.
      same_tokens: reward model and policy give every id the same meaning.
    """

    tokens: Array
    mask: Array
    stop_ids: Sequence[int]
    pad_id: int
    vocab_size: int
    log_probs: Array | None = None
    old_log_probs: Array | None = None
    rollout_log_probs: Array | None = None
    sampling_log_probs: Array | None = None
    reference_log_probs: Array | None = None
    score_tokens: Array | None = None
    rewards: Array | None = None
    advantages: Array | None = None
    centred: bool = True
    values: Array | None = None
    returns: Array | None = None
    chosen: Array | None = None
    rejected: Array | None = None
    same_tokens: bool | None = None


class Finding(NamedTuple):
    """One check: what was found, what was wanted, and what to do where it failed."""

    name: str
    found: str
    wanted: str
    passed: bool
    advice: str


def examine(evidence: Evidence, config: DoctorConfig = DoctorConfig()) -> list[Finding]:
    """Returns what each check found of the evidence that there is."""
    whole = Evidence(*(np.asarray(x) if hasattr(x, "shape") else x for x in evidence))
    return [finding for check in CHECKS if (finding := check(whole, config))]


def _ids(e: Evidence, config: DoctorConfig) -> Finding:
    outside = [stop for stop in e.stop_ids if not 0 <= stop < e.vocab_size]
    return Finding(
        "stop ids", f"{list(e.stop_ids)} of {e.vocab_size} tokens", "one or more, all of the vocabulary",
        bool(e.stop_ids) and not outside,
        "answers cannot end: take the stop ids from the tokenizer of this model (tokenizer.chat.stop_ids)",
    )  # fmt: skip


def _padding(e: Evidence, config: DoctorConfig) -> Finding:
    return Finding(
        "padding", f"pad {e.pad_id}, stop {list(e.stop_ids)}", "another id than any stop id",
        e.pad_id not in e.stop_ids,
        "what masks padding by its id masks ends, too, and the model never learns to stop: pad with another id",
    )  # fmt: skip


def _ended(e: Evidence, config: DoctorConfig) -> Finding:
    answers = [row[mask != 0] for row, mask in zip(e.tokens, e.mask, strict=True)]
    ended = np.array([len(a) > 0 and a[-1] in e.stop_ids for a in answers])
    early = sum(bool(np.isin(a[:-1], e.stop_ids).any()) for a in answers)
    empty = sum(len(a) == 0 for a in answers)
    return Finding(
        "ends",
        f"{ended.mean():.1%} end with a stop id, {early} go on behind one, {empty} are empty or have no reward",
        f"{config.ended:.0%} or more, 0, 0", bool(ended.mean() >= config.ended and not early and not empty),
        "the base never learned to stop (fine-tune it with ends in its loss), max_new_tokens is too small, or the mask "
        "of answers is off by one",
    )  # fmt: skip


def _ratio(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.log_probs is None or e.old_log_probs is None:
        return None
    with np.errstate(over="ignore"):
        off = _largest(np.expm1((e.log_probs - e.old_log_probs)[e.mask != 0]))
    return Finding(
        "ratio", f"at most {off:.2e} off 1", f"{config.ratio:g}", off <= config.ratio,
        "the update does not compute the old policy: look for dropout, a shift of one place, other positions, or "
        "weights that moved between rollout and update",
    )  # fmt: skip


def _rollout(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.log_probs is None or e.rollout_log_probs is None:
        return None
    off = _largest((e.log_probs - e.rollout_log_probs)[e.mask != 0])
    return Finding(
        "rollout", f"log-probabilities differ by at most {off:.2e}", f"{config.log_probs:g} nats",
        off <= config.log_probs,
        "rollout and training disagree on the model: compare dtypes, positions, the cache, adapters merged or not; in "
        "bfloat16 set doctor.log_probs to what rounding explains",
    )  # fmt: skip


def _sampling(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.rollout_log_probs is None or e.sampling_log_probs is None:
        return None
    seen = e.mask != 0
    weights = np.exp(np.minimum((e.rollout_log_probs - e.sampling_log_probs)[seen], 700.0))
    sound = bool(np.isfinite(e.sampling_log_probs[seen]).all() and (e.sampling_log_probs[seen] <= 1e-6).all())
    return Finding(
        "sampling", f"policy / sampled from: {weights.min():.3g} to {weights.max():.3g}, mean {weights.mean():.3g}",
        "log-probabilities, finite, 0 or less", sound,
        "a sampled token has no probability where it was drawn from: the filters that are recorded are not those that "
        "were in force",
    )  # fmt: skip


def _kl(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.log_probs is None or e.reference_log_probs is None:
        return None
    d = (e.reference_log_probs - e.log_probs)[e.mask != 0].astype(np.float64)
    kl = float(np.mean(np.expm1(d) - d))
    return Finding(
        "kl", f"{kl:.2e} nats a token, at most {_largest(d):.2e} apart", f"{config.kl:g}, {config.log_probs:g}",
        kl <= config.kl and _largest(d) <= config.log_probs,
        "the policy does not begin as its reference: the two were loaded from different places, or adapters do not "
        "begin at zero",
    )  # fmt: skip


def _score_place(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.score_tokens is None:
        return None
    at_end = np.isin(e.score_tokens, e.stop_ids)
    padded = int((e.score_tokens == e.pad_id).sum())
    return Finding(
        "score", f"{at_end.mean():.1%} read at a stop id, {padded} at padding", "all, none",
        bool(at_end.all() and not padded),
        "the reward model's score is read beside the end of the answer: give it the place of the stop id, one that is "
        "appended where the answer was cut off",
    )  # fmt: skip


def _rewards(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.rewards is None:
        return None
    finite, spread = bool(np.isfinite(e.rewards).all()), float(np.std(e.rewards))
    return Finding(
        "rewards", f"{np.mean(e.rewards):.4g} ± {spread:.3g}, {e.rewards.min():.4g} to {e.rewards.max():.4g}",
        "finite, not all the same", finite and spread > 0,
        "nothing tells good answers from bad ones: look at reward/errors, at the form that final answers are read in, "
        "and whether the task is far too easy or too hard for this model",
    )  # fmt: skip


def _advantages(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.advantages is None:
        return None
    found = _of_answers(e.advantages, e.mask) if e.advantages.ndim == 2 else e.advantages
    mean, spread = float(np.mean(found)), float(np.std(found))
    sound = bool(np.isfinite(found).all()) and spread > 0
    return Finding(
        "advantages", f"{mean:.3g} ± {spread:.3g}",
        f"finite, spread over 0{f', mean within {config.centre:g} of it' if e.centred else ''}",
        sound and (not e.centred or abs(mean) <= config.centre * spread),
        "all answers of each group have one reward (then nothing is learned), or groups are not the answers to one "
        "prompt, or padding was averaged in",
    )  # fmt: skip


def _values(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.values is None or e.returns is None:
        return None
    values, returns = (x[e.mask != 0].astype(np.float64) for x in (e.values, e.returns))
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    error, size = rms(values - returns), rms(returns)
    return Finding(
        "values", f"root mean squares: error {error:.3g}, returns {size:.3g}", f"{config.value_error:g} times or less",
        bool(error <= config.value_error * size),
        "values and returns are of other sizes: begin the value model as the reward model, normalise rewards, or give "
        "it a longer warm-up of its own",
    )  # fmt: skip


def _reward_model(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.chosen is None or e.rejected is None:
        return None
    accuracy = float(np.mean(e.chosen > e.rejected))
    error, scores = np.sqrt(accuracy * (1 - accuracy) / len(e.chosen)), np.concatenate([e.chosen, e.rejected])
    return Finding(
        "reward model",
        f"{accuracy:.3f} ± {error:.3f} of {len(e.chosen)} pairs; scores {histogram(scores)}",
        f"{config.accuracy:g} or more", bool(accuracy >= config.accuracy and np.isfinite(scores).all()),
        "the reward model does not know what people prefer: train it longer, or on prompts like these",
    )  # fmt: skip


def _vocabulary(e: Evidence, config: DoctorConfig) -> Finding | None:
    if e.same_tokens is None:
        return None
    return Finding(
        "vocabulary", "the same" if e.same_tokens else "not the same", "one of policy and reward model", e.same_tokens,
        "the reward model reads other words than were written: train one on the policy's tokenizer",
    )  # fmt: skip


CHECKS = (
    _ids, _padding, _vocabulary, _ended, _ratio, _rollout, _sampling, _kl, _score_place, _rewards, _advantages, _values,
    _reward_model,
)  # fmt: skip


def table(findings: Sequence[Finding]) -> str:
    """Returns what was found, as lines for a terminal."""
    rows = [("ok" if f.passed else "FAILED", f.name, f.found, f"wanted: {f.wanted}") for f in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def report(findings: Sequence[Finding]) -> list[Block]:
    """Returns what was found, for report.md."""
    rows = [["yes" if f.passed else "NO", f.name, f.found, f.wanted, "" if f.passed else f.advice] for f in findings]
    return [
        Text("What the doctor found before the first update", 2),
        Table(["passed", "check", "found", "wanted", "what to do"], rows),
    ]


def insist(findings: Sequence[Finding], config: DoctorConfig = DoctorConfig()) -> None:
    """Raises where a check failed.

    Raises:
      InputError: one line, of the first check that failed and is not in config.tolerated; it names the others.
    """
    failed = [finding for finding in findings if not finding.passed and finding.name not in config.tolerated]
    if failed:
        first, others = failed[0], ", ".join(finding.name for finding in failed[1:])
        raise InputError(
            f"the doctor stops this run before its first update: {first.name}: found {first.found}; wanted "
            f"{first.wanted}; {first.advice}{f' (failed, too: {others})' if others else ''}"
        )


def keep(folder: pathlib.Path, findings: Sequence[Finding]) -> None:
    """Writes doctor.json into a run's folder, on the first process: a run that goes on has it for its report."""
    hosts.once(lambda: write_whole(folder / FILE, json.dumps([f._asdict() for f in findings], indent=2) + "\n"))


def read(folder: pathlib.Path) -> list[Finding]:
    """Returns what `keep` wrote; nothing where it did not."""
    path = folder / FILE
    return [Finding(**found) for found in json.loads(path.read_text())] if path.exists() else []


def _of_answers(x_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Returns what stands under the mask; where all tokens of each answer share one value, one of each answer.

    Advantages of groups are centred over answers: over tokens, long answers would count more.
    """
    rows = [row[mask != 0] for row, mask in zip(x_BT, mask_BT, strict=True)]
    shared = all(len(row) == 0 or np.ptp(row) == 0 for row in rows)
    return np.concatenate([row[:1] if shared else row for row in rows])


def _largest(x: np.ndarray) -> float:
    """The largest |x|; inf where one is not finite, 0 where there is none."""
    return float(np.abs(x).max(initial=0.0)) if np.isfinite(x).all() else float("inf")


def histogram(values: np.ndarray, bins: int = 12) -> str:
    """Returns a line such as "-1.2 ▁▃█▂ 3.4": where values lie."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins)
    marks = "▁▂▃▄▅▆▇█"
    heights = np.ceil(counts / max(counts.max(), 1) * (len(marks) - 1)).astype(int)
    return f"{edges[0]:.3g} {''.join(marks[height] for height in heights)} {edges[-1]:.3g}"
