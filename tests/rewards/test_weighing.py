"""The weighted sum is that of a loop; what goes wrong gets the fallback, is counted and said once."""

import pathlib
import re

import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.rewards import RewardConfig, Rewards, Sample, calling, tasks, weighing
from qwen_jax.training import doctor, watch

USER = "tests.rewards.functions:told"


def sample(said="", ids=(), finished=True, **reference):
    return Sample([{"role": "user", "content": "?"}], said, ids, finished, reference)


def test_the_total_is_the_weighted_sum_of_the_parts():
    problem = tasks.load("sums", "train", 1)[0]
    right = problem.reference["answer"]
    some = [
        sample(problem.solution, [1, 2, 3], **problem.reference),
        sample(f"{right} it is", [1, 1, 1, 1], finished=False, **problem.reference),
        sample("I do not know", [4] * 10, **problem.reference),
    ]
    config = RewardConfig(
        terms=("answer", "format=0.5", "length=2", "repetition=0.25", "unfinished", "model=-1"),
        longest=8, margin=4, ngram=1,
    )  # fmt: skip
    found = Rewards(config, {"model": lambda samples: np.arange(len(samples))}).score(some)
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        "answer": [1, 1, 0], "format": [1, 0, 0], "length": [0, 0, -1],
        "repetition": [0, -0.75, pytest.approx(-0.9)], "unfinished": [0, -1, 0], "model": [0, 1, 2],
    }  # fmt: skip
    assert found.total.tolist() == pytest.approx([1.5, 1 - 0.1875 - 1 - 1, -2 - 0.225 - 2])
    assert found.metrics["reward/mean"] == pytest.approx(found.total.mean())
    assert found.metrics["reward/std"] == pytest.approx(found.total.std())
    assert found.metrics["reward/format"] == pytest.approx(1 / 3) and found.metrics["reward/errors"] == 0
    assert not found.failed.any()


def test_what_fails_gets_the_fallback_is_counted_and_said_once_a_kind():
    lines = []
    rewards = Rewards(RewardConfig(terms=(f"{USER}=2", "unfinished"), fallback=-0.5), say=lines.append)
    some = [sample(do=1.0), sample(do="raise"), sample(do=float("nan")), sample(do=float("inf"), finished=False)]
    found = rewards.score(some)
    assert found.parts[USER].tolist() == [1.0, -0.5, -0.5, -0.5] and found.failed.tolist() == [False, True, True, True]
    assert found.total.tolist() == [2.0, -1.0, -1.0, -2.0]
    counted = {name: value for name, value in found.metrics.items() if name.startswith("reward/errors")}
    assert counted == {"reward/errors": 3, "reward/errors/raised": 1, "reward/errors/finite": 2}
    assert len(lines) == 2 and "failed on 1 of 4 samples (raised: KeyError" in lines[0]
    again = rewards.score([sample(do=float("nan"))])
    assert again.metrics["reward/errors"] == 1 and len(lines) == 2
    rewards.close()


def test_an_answer_that_cannot_be_judged_fails_and_one_that_is_missing_is_wrong():
    rewards = Rewards(RewardConfig(), say=lambda line: None)
    found = rewards.score([sample("3", answer="3"), sample("nothing"), sample("3")])
    assert found.total.tolist() == [1.0, 0.0, 0.0] and found.failed.tolist() == [False, False, True]


def test_no_samples_are_no_trouble():
    found = Rewards(RewardConfig(terms=("answer", "format"))).score([])
    assert found.total.shape == (0,) and found.metrics["reward/mean"] == 0


@pytest.mark.parametrize(
    "fields, line",
    [
        (dict(terms=()), "reward.terms is empty"),
        (dict(terms=("answer=much",)), "has 'answer=much'; expected NAME=WEIGHT"),
        (dict(terms=("answer=nan",)), "has 'answer=nan'; expected NAME=WEIGHT"),
        (dict(terms=("format", "format=2")), "has 'format' twice"),
        (dict(terms=("helpful",)), "has 'helpful'; expected one of answer, format"),
        (dict(terms=("length",)), "reward.longest 0 and reward.margin 0"),
        (dict(timeout=0.0), "reward.timeout 0.0"),
    ],
)
def test_rewards_that_there_are_not_are_one_line(fields, line):
    with pytest.raises(InputError, match=line):
        Rewards(RewardConfig(**fields))


DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def test_the_page_names_all_there_is_and_its_function_works():
    named = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)))
    assert {*weighing.NAMES, *doctor.NAMES, *watch.SIGNS} <= named
    names = {}
    exec(re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1], names)
    assert calling.call(names["polite"], [sample("please do"), sample("no")]) == [1.0, 0.0]
    flags = re.search(r"--rewarded.terms (.*)", DOCS)[1].split()
    assert RewardConfig(terms=tuple(flags)).weights()["length"] == 0.5
