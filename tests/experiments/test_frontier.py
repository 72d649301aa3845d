"""The frontier: its figures are those of its runs, and runs that cannot be compared are refused."""

import json

import numpy as np
import pytest

from experiments.ablations import frontier
from qwen_jax.errors import InputError
from qwen_jax.training import samples


def write(folder, by_step, *, experiment="ppo", prompts=("a", "b")):
    """A run's folder: step -> (kl, reward) of each answer, the prompts in turn."""
    folder.mkdir(parents=True)
    record = dict(experiment=experiment, recipe="small", config={}, started="now")
    (folder / "config.json").write_text(json.dumps(record))
    for step, some in by_step.items():
        answers = [dict(prompt=prompts[n % len(prompts)], ids=[1], kl=kl, reward=reward, finished=True)
                   for n, (kl, reward) in enumerate(some)]  # fmt: skip
        samples.write(folder, step, answers)
    return folder


START = [(0.0, -1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 2.0)]


def test_figures_are_means_over_seeds_with_their_spread(tmp_path):
    one = write(tmp_path / "0", {0: START, 5: [(1.0, 0.0), (1.0, 2.0), (3.0, 0.0), (3.0, 2.0)]})
    two = write(tmp_path / "1", {0: START, 5: [(4.0, 3.0)] * 4, 9: [(9.0, 9.0)] * 4})
    best = write(tmp_path / "best", {0: START}, experiment="best_of_n")
    config = frontier.Config(runs=(f"ppo={one},{two}", f"best-of-n={best}"))
    found = frontier.run(config, tmp_path / "run", "runs")
    (_, first, nothing), (place, mean, spread) = frontier.over_seeds(found["ppo"])
    assert first.tolist() == [0.0, 0.5, 0.5] and nothing.tolist() == [0.0, 0.0, 0.0] and place == 5
    assert mean.tolist() == [3.0, 2.0, 0.875]  # of one two wins and two ties, of the other all
    np.testing.assert_allclose(spread[:2], [np.std([2.0, 4.0], ddof=1), np.std([1.0, 3.0], ddof=1)])
    points = found["best-of-n"][0].points  # prompt a has -1 and 0, prompt b 1 and 2
    assert [(p.place, p.reward) for p in points] == [(1, 0.5), (2, 1.0)]
    assert points[1].kl == pytest.approx(np.log(2) - 0.5)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| ppo | 2 | 5 | 3.000 ± 1.414 | 2.000 ± 1.414 |" in report and "| best-of-n | 1 | 2 | 0.193" in report
    assert (tmp_path / "run" / "plots" / "frontier.png").stat().st_size > 5000


def test_the_smoke_reaches_its_report(tmp_path):
    found = frontier.run(frontier.smoke(), tmp_path / "run", "smoke")
    assert [len(some) for some in found.values()] == [2, 2]
    assert "| made-up | 2 | 20 |" in (tmp_path / "run" / "report.md").read_text()


def test_runs_that_cannot_be_compared_are_one_line(tmp_path):
    one = write(tmp_path / "one", {0: START})
    other = write(tmp_path / "other", {0: START}, prompts=("a", "c"))
    elsewhere = write(tmp_path / "elsewhere", {0: [(0.0, reward + 9) for _, reward in START]})
    empty = write(tmp_path / "empty", {})
    for runs, line in {
        (f"a={one}", f"b={other}"): "other answers other prompts than",
        (f"a={one},{elsewhere}",): "elsewhere begins at a reward of 9.500, .*one at 0.500",
        (f"a={empty}",): "empty has no judged samples",
        (f"a={one}", f"a={one}"): "expected NAME=DIR,DIR,..., each name once",
        ("a",): "has 'a'; expected NAME=DIR",
        (): "--runs is missing",
    }.items():
        with pytest.raises(InputError, match=line):
            frontier.run(frontier.Config(runs=runs), tmp_path / f"run{len(line)}", "runs")
