"""The signs: each shows where it should, once, and nothing shows in a healthy run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.training import watch

HEALTHY = {
    "rollout/length": 30.0, "rollout/repetition": 0.05, "rollout/unfinished": 0.1, "rollout/entropy": 2.0,
    "rollout/kl": 1.0, "policy/clip_fraction": 0.05, "rollout/flat_groups": 0.2, "rollout/reward_errors": 0.0,
}  # fmt: skip
SICK = {
    "longer": 90.0, "shorter": 3.0, "repetition": 0.6, "unfinished": 0.9, "entropy": 0.1, "kl": 50.0, "clip": 0.8,
    "flat": 1.0, "errors": 0.5,
}  # fmt: skip


def history(sign=None, steps=40):
    """A run that goes wrong in its second half, if a sign is named."""
    rows = [{"step": step, **HEALTHY} for step in range(1, steps + 1)]
    for row in rows[steps // 2 :] if sign else ():
        row[watch.SIGNS[sign].metric] = SICK[sign]
    return rows


@pytest.mark.parametrize("sign", watch.SIGNS)
def test_a_sign_shows_alone_and_once_and_not_before_it_is_there(sign):
    (found,) = watch.over(history(sign), watch.WatchConfig(window=5))
    assert found.sign == sign and 20 < found.step <= 25 and not found.stop and "\n" not in found.text
    assert watch.over(history(sign), watch.WatchConfig(window=5, **{sign: 0})) == []
    assert watch.over(history(sign)[:20], watch.WatchConfig(window=5)) == []


def test_a_healthy_run_shows_nothing():
    assert watch.over(history()) == []


def test_a_sign_that_went_away_is_told_again():
    rows = history("clip", 40) + history("clip", 40)
    assert [found.sign for found in watch.over(rows, watch.WatchConfig(window=5))] == ["clip", "clip"]


@given(st.integers(0, 40))
def test_a_run_that_goes_on_from_its_state_sees_what_it_would_have_seen(cut):
    rows, config, state, told = history("kl"), watch.WatchConfig(window=4), watch.begin(), []
    for place, row in enumerate(rows):
        if place == cut:
            state = json.loads(json.dumps(state))
        state, some = watch.look(state, row, config)
        told += some
    assert told == watch.over(rows, config)


@pytest.mark.parametrize("stop, expected", [(("kl",), True), (("all",), True), (("clip",), False), ((), False)])
def test_the_config_says_which_signs_stop_a_run(stop, expected):
    (found,) = watch.over(history("kl"), watch.WatchConfig(stop=stop))
    assert found.stop is expected


def test_what_is_missing_or_not_finite_is_passed_over():
    rows = [{"step": 1}, {"step": 2, "rollout/kl": math.nan}, {"step": 3, "rollout/kl": 99.0}]
    (found,) = watch.over(rows, watch.WatchConfig(window=1))
    assert (found.sign, found.step) == ("kl", 3)


def test_signs_that_there_are_not_are_one_line():
    with pytest.raises(InputError, match="watch.stop has 'hacking'; expected all, or some of longer"):
        watch.WatchConfig(stop=("hacking",))
    with pytest.raises(InputError, match="watch.window is 0"):
        watch.WatchConfig(window=0)


def test_the_figures_of_a_rollout_are_those_of_loops():
    answers = [[1, 2, 1, 2, 1, 2], [3], [4, 5], [6, 7, 8, 9]]
    found = watch.figures(
        answers, finished=[True, False, True, True], rewards=np.array([[1.0, 1.0], [0.0, 2.0]]),
        failed=[False, False, False, True], log_probs=np.array([-6.0, -1.0, -2.0, -4.0]), kl=np.array([0.0, 1, 2, 5]),
    )  # fmt: skip
    assert found == {
        "rollout/length": 13 / 4, "rollout/repetition": pytest.approx((1 / 3) / 4), "rollout/unfinished": 0.25,
        "rollout/flat_groups": 0.5, "rollout/reward_errors": 0.25, "rollout/entropy": 1.0, "rollout/kl": 2.0,
    }  # fmt: skip
    assert set(found) | {"policy/clip_fraction"} == {sign.metric for sign in watch.SIGNS.values()}
