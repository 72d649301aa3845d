"""Figures of agreement with people: against loops and closed forms."""

import itertools
import types

import numpy as np
import pytest

from qwen_jax.data.preferences import Answers
from qwen_jax.eval import policies, preferences


def answers(seed=0, count=60):
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count // 3), 3)
    documents = [types.SimpleNamespace(loss_mask=np.ones(int(n))) for n in draw.integers(1, 30, count)]
    domains = ["a" if n % 3 else "b" for n in range(count // 3)]
    return Answers(documents, draw.integers(0, 5, count).astype(np.float32), groups, domains)


@pytest.mark.parametrize("least", [0.0, 2.0])
def test_figures_are_those_of_a_loop_over_all_comparisons(least):
    some, draw = answers(), np.random.default_rng(1)
    scores = (some.values + draw.normal(0, 2, 60)).astype(np.float32)
    found = preferences.figures(preferences.scored(some, scores, least=least))
    right, losses, by_domain = [], [], {"a": [], "b": []}
    for i in range(60):
        for j in range(60):
            lead = some.values[i] - some.values[j]
            if some.groups[i] == some.groups[j] and lead > 0 and lead >= least:
                right.append(scores[i] > scores[j])
                losses.append(np.log1p(np.exp(scores[j] - scores[i])))
                by_domain[some.domains[some.groups[i]]].append(right[-1])
    assert found["pairs"] == len(right) > 15
    assert found["accuracy"] == pytest.approx(np.mean(right)) and found["nll"] == pytest.approx(
        np.mean(losses), rel=1e-5
    )
    for name, rights in by_domain.items():
        assert found["by_domain"][name]["accuracy"] == pytest.approx(np.mean(rights))
    assert sum(one["pairs"] for one in found["by_margin"].values()) == len(right)
    lengths = [len(document.loss_mask) for document in some.documents]
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-6)


def test_calibration_of_a_model_that_is_right_as_often_as_it_says_is_0_and_of_one_that_boasts_is_not():
    odds = np.log(0.8 / 0.2)
    lead = np.array([odds] * 8 + [-odds] * 2)  # 80% sure, right 8 times in 10
    assert preferences.reliability(lead)[0] == pytest.approx(0, abs=1e-12)
    error, table = preferences.reliability(np.array([1e4] * 5 + [-1e4] * 5))  # certain, right half of the time
    assert error == pytest.approx(0.5) and table[-1].tolist() == [1, 0.5, 1] and np.isnan(table[:-1]).all()


def test_what_does_not_vary_correlates_with_nothing():
    assert preferences.correlation(np.ones(4), np.arange(4)) == 0


def test_the_frontier_is_the_mean_of_each_step():
    kept = {0: [dict(kl=0.0, reward=1.0), dict(kl=0.0, reward=3.0)], 5: [dict(kl=2.0, reward=4.0)]}
    assert policies.frontier(kept) == [(0, 0.0, 2.0, pytest.approx(1 / np.sqrt(2))), (5, 2.0, 4.0, 0.0)]


def test_the_best_of_n_is_the_mean_over_all_choices_of_n():
    rewards = np.random.default_rng(0).normal(0, 1, (3, 8)).tolist()
    found = policies.by_n(rewards)
    assert [row["n"] for row in found] == [1, 2, 4, 8]
    for row in found:
        n = row["n"]
        every = [[max(chosen) for chosen in itertools.combinations(some, n)] for some in rewards]
        assert row["reward"] == pytest.approx(np.mean(every))
        assert row["kl_bound"] == pytest.approx(np.log(n) - (n - 1) / n)
    assert found[0]["kl_bound"] == 0 and found[-1]["reward"] == pytest.approx(np.max(rewards, axis=1).mean())
