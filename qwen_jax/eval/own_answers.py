"""Figures of a policy's answers, and against those of the model it began as.

An answer is a sample of `policies.Judge.samples`: "ids", "reward", "kl", "log_prob", "finished" and its texts. Answers
of two policies stand in the same order: of the same prompts, as many to each.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.rewards import terms
from qwen_jax.training.page import Block, Table, Text

NGRAM = 4  # tokens of a run that counts as repeated
MOST_TEXT = 300  # characters of an answer that a table shows
MOST_PROMPTS = 12  # of which a table shows an answer


class Rate(NamedTuple):
    """A share, and the interval that holds the true one in 95 of 100 cases."""

    share: float
    low: float
    high: float


def figures(samples: Sequence[Mapping]) -> dict[str, float]:
    """Returns what there is to say of answers, in numbers.

    "reward" and "kl" (nats an answer), their standard errors "reward_error" and "kl_error"; "length" in tokens;
    "finished", the share that ended by themselves; "entropy" in nats a token, estimated without bias by less the mean
    log-probability of what was sampled; "distinct_1" and "distinct_2", the different n-grams of all answers over all
    n-grams (Li et al., arXiv:1510.03055, section 5): comparable between equally many answers of similar length;
    "repetition", the mean share of an answer's runs of NGRAM tokens that it has had before; "failed", the share whose
    reward nobody could tell (it is not finite): they count in all figures but the reward's.

    Raises:
      InputError: there are no answers, or none has a reward.
    """
    if not any(math.isfinite(sample["reward"]) for sample in samples):
        raise InputError(f"of {len(samples)} answers none has a reward; expected some that have one")
    column = lambda name: np.array([sample[name] for sample in samples], np.float64)
    error = lambda x: float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
    rewards, ids = column("reward"), [sample["ids"] for sample in samples]
    known = rewards[np.isfinite(rewards)]
    lengths = np.array([len(some) for some in ids])
    found = {
        "reward": float(known.mean()), "reward_error": error(known), "failed": 1 - len(known) / len(rewards),
        "kl": float(column("kl").mean()), "kl_error": error(column("kl")),
        "length": float(lengths.mean()), "finished": float(column("finished").mean()),
        "distinct_1": distinct(ids, 1), "distinct_2": distinct(ids, 2),
        "repetition": float(np.mean([terms.repeated(some, NGRAM) for some in ids])),
    }  # fmt: skip
    if all("log_prob" in sample for sample in samples):  # runs of an earlier version did not keep it
        found["entropy"] = float(-column("log_prob").sum() / max(lengths.sum(), 1))
    return found


def distinct(answers: Sequence[Sequence[int]], size: int) -> float:
    """Returns the number of different n-grams in all answers over that of all n-grams; 0 where there are none."""
    grams = [tuple(ids[place : place + size]) for ids in answers for place in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def win_rate(mine: Sequence[float], theirs: Sequence[float], *, sigmas: float = 1.96) -> Rate:
    """Returns how often an answer has the higher reward, equal ones counting half, with Wilson's interval.

    Pairs are independent given their prompts: the interval is about these prompts. With halves it is a little too wide.
    Pairs of which one has no finite reward are left out.

    Args:
      mine, theirs: rewards of the policies' answers to the same prompts, in the same order.
      sigmas: half the interval's width in standard errors of a normal.

    Raises:
      InputError: not as many of each, or none.
    """
    if len(mine) != len(theirs) or not len(mine):
        raise InputError(f"answers to compare are {len(mine)} and {len(theirs)}; expected as many of each, and some")
    a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise InputError(f"of {len(a)} pairs of answers none has two rewards; expected some that have")
    a, b = a[both], b[both]
    share, n = float(np.mean((a > b) + 0.5 * (a == b))), len(a)
    middle = (share + sigmas**2 / (2 * n)) / (1 + sigmas**2 / n)
    half = sigmas * math.sqrt(share * (1 - share) / n + (sigmas / (2 * n)) ** 2) / (1 + sigmas**2 / n)
    return Rate(share, middle - half, middle + half)


def blocks(kept: Mapping[int, Sequence[Mapping]]) -> list[Block]:
    """Returns what a report shows: figures by step, and answers before and after.

    Args:
      kept: step -> answers, those of the first step of the model that training began with; empty: no blocks.
    """
    if not kept:
        return []
    first, last = min(kept), max(kept)
    of = lambda step, name: [sample[name] for sample in kept[step]]
    comparable = [step for step in kept if of(step, "prompt") == of(first, "prompt")]
    rows = []
    for step, some in kept.items():
        f = figures(some)
        won = win_rate(of(step, "reward"), of(first, "reward")) if step in comparable and step != first else None
        rows.append([
            str(step), f"{f['kl']:.2f} ± {f['kl_error']:.2f}", f"{f['reward']:.3f} ± {f['reward_error']:.3f}",
            f"{won.share:.1%} ({won.low:.1%} to {won.high:.1%})" if won else "", f"{f['length']:.1f}",
            f"{f['finished']:.0%}", f"{f['entropy']:.2f}" if "entropy" in f else "",
            f"{f['distinct_1']:.3f}, {f['distinct_2']:.3f}", f"{f['repetition']:.1%}",
        ])  # fmt: skip
    header = [
        "step", "KL from the reference, nats an answer", "reward", f"wins against step {first}", "tokens", "ended",
        "entropy, nats a token", "distinct-1, -2", "repetition",
    ]  # fmt: skip
    return [
        Text("The policy's own answers", 2),
        Text(
            f"{len(kept[last])} answers to {len(set(of(last, 'prompt')))} held-out prompts, sampled at temperature 1; "
            "± is the standard error of the mean. A win is a higher reward for the same prompt, a tie half of one; in "
            "brackets the 95% interval (Wilson)."
        ),
        Table(header, rows),
        *before_and_after(kept[first], kept[last], steps=(first, last)),
    ]


def before_and_after(
    before: Sequence[Mapping], after: Sequence[Mapping], *, steps: tuple[int, int] = (0, 1)
) -> list[Block]:
    """Returns a table of an answer to each prompt, the first one of each policy: not chosen by what it got."""
    earlier: dict[str, Mapping] = {}
    for sample in before:
        earlier.setdefault(sample["prompt"], sample)
    later: dict[str, Mapping] = {}
    for sample in after:
        later.setdefault(sample["prompt"], sample)
    shown = [prompt for prompt in earlier if prompt in later][:MOST_PROMPTS]
    told = lambda sample: f"{sample['reward']:.2f}: {sample['completion'][:MOST_TEXT]}"
    rows = [[f"… {p[-MOST_TEXT:]}" if len(p) > MOST_TEXT else p, told(earlier[p]), told(later[p])] for p in shown]
    return [
        Text("Answers before and after", 2),
        Text("The first answer of each to a prompt, behind its reward."),
        Table(["prompt", *(f"step {step}" for step in steps)], rows),
    ]
