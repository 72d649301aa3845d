"""Tasks of reasoning-gym: drawn by seed, scored by the task itself in a process of its own; skips without it."""

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'qwen_jax[rl]'")

from qwen_jax.errors import InputError
from qwen_jax.rewards import RewardConfig, Rewards, Sample, gym, tasks

TASK = "gym/chain_sum min_terms=2 max_terms=3 min_digits=1 max_digits=2"


def test_problems_are_the_same_each_time_and_of_the_options_that_were_asked_for():
    some = tasks.load(TASK, "train", 20, seed=1)
    assert some == tasks.load(TASK, "train", 20, seed=1)
    assert all(problem.reference["entry"]["metadata"]["num_terms"] in (2, 3) for problem in some)
    for problem in some:
        assert problem.reference["answer"] == problem.solution
        assert eval(problem.reference["entry"]["metadata"]["expression"]) == int(problem.solution)


def test_neighbouring_seeds_share_no_problem_but_by_chance():
    """Of reasoning-gym itself, item i of seed s is item i - 1 of seed s + 1."""
    wide = "gym/chain_sum min_digits=6 max_digits=6"
    one, two = ({p.question for p in tasks.load(wide, "train", 30, seed=seed)} for seed in (0, 1))
    assert not one & two


def test_the_task_scores_the_answer_that_was_extracted():
    problems = tasks.load(TASK, "test", 4)
    config = RewardConfig(terms=("answer", "format=0.5"), task=TASK, form="tag")
    rewards = Rewards(config)
    right, wrong, bare, late = (
        Sample([], text, reference=problem.reference)
        for problem, text in zip(
            problems,
            [f"<answer>{problems[0].solution}</answer>", "<answer>1000000</answer>", problems[2].solution,
             f"<answer>{problems[3].solution}</answer> I think"],
            strict=True,
        )
    )  # fmt: skip
    found = rewards.score([right, wrong, bare, late])
    rewards.close()
    assert found.parts["answer"].tolist() == [1.0, 0.0, 0.0, 1.0] and found.metrics["reward/errors"] == 0
    assert found.parts["format"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_tasks_that_there_are_not_are_one_line():
    for task, line in {
        "gym/chain_sums": "cannot make the task 'gym/chain_sums'",
        "gym/chain_sum terms=2": "cannot make the task .*unexpected keyword argument 'terms'",
        "gym/chain_sum min_terms=0": "cannot make the task",
    }.items():
        with pytest.raises(InputError, match=line) as error:
            tasks.load(task, "train", 1)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["basic_arithmetic", "gcd", "number_sorting", "pool_matrix", "word_ladder"])
def test_a_tasks_own_answer_is_worth_1(name):
    problems = tasks.load(f"gym/{name}", "train", 3)
    assert gym.score([Sample([], p.solution, reference=p.reference) for p in problems]) == [1.0] * 3


def test_a_task_that_knows_no_answer_has_no_solution():
    assert {problem.solution for problem in tasks.load("gym/graph_color", "train", 2)} == {""}


def test_problems_go_on_behind_the_size_that_a_task_may_have(monkeypatch):
    monkeypatch.setattr(gym, "SIZE", 3)
    assert len(tasks.load("gym/gcd max_numbers=3", "train", 20, seed=7)) == 20
