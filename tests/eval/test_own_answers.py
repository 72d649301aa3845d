"""Figures of answers: against loops, closed forms and scipy's interval by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.eval import own_answers


def sample(prompt="p", ids=(1, 2), reward=0.0, kl=0.0, log_prob=-1.0, finished=True):
    return dict(prompt=prompt, ids=list(ids), reward=reward, kl=kl, log_prob=log_prob, finished=finished,
                completion=f"{reward} it is")  # fmt: skip


def test_figures_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    some = [sample(ids=draw.integers(0, 4, int(n)), reward=float(draw.normal()), kl=float(draw.normal()),
                   log_prob=-float(n) * 1.5, finished=bool(n % 2)) for n in draw.integers(1, 12, 30)]  # fmt: skip
    found = own_answers.figures(some)
    for name in ("reward", "kl"):
        values = [one[name] for one in some]
        assert found[name] == pytest.approx(np.mean(values))
        assert found[f"{name}_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(30))
    assert found["length"] == pytest.approx(np.mean([len(one["ids"]) for one in some]))
    assert found["finished"] == pytest.approx(np.mean([one["finished"] for one in some]))
    assert found["entropy"] == pytest.approx(1.5)
    for size in (1, 2):
        seen, count = set(), 0
        for one in some:
            for place in range(len(one["ids"]) - size + 1):
                seen.add(tuple(one["ids"][place : place + size]))
                count += 1
        assert found[f"distinct_{size}"] == pytest.approx(len(seen) / count)
    again = []
    for one in some:
        grams = [tuple(one["ids"][n : n + 4]) for n in range(len(one["ids"]) - 3)]
        again.append(sum(gram in grams[:n] for n, gram in enumerate(grams)) / len(grams) if grams else 0)
    assert found["repetition"] == pytest.approx(np.mean(again)) and np.mean(again) > 0


def test_one_answer_has_no_error_and_an_older_run_no_entropy():
    old = {name: value for name, value in sample(ids=[3]).items() if name != "log_prob"}
    found = own_answers.figures([old])
    assert found["reward_error"] == 0 and found["distinct_2"] == 0 and "entropy" not in found


@pytest.mark.parametrize(
    "wins, count, low, high", [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (50, 100, 0.4038, 0.5962)]
)
def test_the_interval_is_wilsons(wins, count, low, high):
    """Published values of Wilson's interval for 8 of 10, 0 of 20 and 50 of 100."""
    found = own_answers.win_rate([1.0] * wins + [0.0] * (count - wins), [0.5] * count)
    assert found == (wins / count, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_win_of_the_one_is_no_win_of_the_other_and_ties_are_halves(pairs):
    mine, theirs = zip(*pairs, strict=True)
    found, mirrored = own_answers.win_rate(mine, theirs), own_answers.win_rate(theirs, mine)
    assert found.share == pytest.approx(sum(1 if a > b else 0.5 if a == b else 0 for a, b in pairs) / len(pairs))
    assert found.share + mirrored.share == pytest.approx(1) and found.low + mirrored.high == pytest.approx(1)
    assert -1e-12 <= found.low <= found.share + 1e-12 and found.share - 1e-12 <= found.high <= 1 + 1e-12


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(InputError, match="answers to compare are 1 and 2"):
        own_answers.win_rate([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="of 1 pairs of answers none has two rewards"):
        own_answers.win_rate([math.nan], [1.0])
    for some in ([], [sample(reward=math.nan)]):
        with pytest.raises(InputError, match=f"of {len(some)} answers none has a reward"):
            own_answers.figures(some)


def test_an_answer_whose_reward_failed_is_left_out_of_rewards_and_wins_and_counted():
    found = own_answers.figures([sample(reward=1.0), sample(reward=math.nan, ids=[1, 2, 3]), sample(reward=3.0)])
    assert found["reward"] == 2 and found["failed"] == pytest.approx(1 / 3) and found["length"] == pytest.approx(7 / 3)
    assert own_answers.win_rate([1.0, math.nan, 2.0], [0.0, 0.0, 2.0]).share == 0.75


def test_a_report_has_figures_by_step_and_the_first_answers_before_and_after():
    kept = {
        0: [sample("a", reward=1.0), sample("a", reward=5.0), sample("b", reward=2.0)],
        9: [sample("a", reward=3.0), sample("a", reward=5.0), sample("b", reward=2.0)],
    }
    _, told, table, _, _, answers = own_answers.blocks(kept)
    assert "3 answers to 2 held-out prompts" in told.text
    assert [row[0] for row in table.rows] == ["0", "9"] and table.rows[0][3] == ""
    assert table.rows[1][3].startswith("66.7% (")  # a win and two ties of three
    assert answers.rows == [["a", "1.00: 1.0 it is", "3.00: 3.0 it is"], ["b", "2.00: 2.0 it is", "2.00: 2.0 it is"]]
    other = own_answers.blocks(kept | {9: [sample("c")]})[2]
    assert other.rows[1][3] == ""  # other prompts are not compared
    assert own_answers.blocks({}) == []
