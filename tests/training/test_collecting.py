"""Rollouts as rows: what was sampled where, who is asked when, what a checkpoint keeps, and what is refused."""

import json

import jax
import numpy as np
import pytest

from qwen_jax import models
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout
from qwen_jax.training import collecting
from qwen_jax.training.collecting import Answered, Collector, SamplingConfig
from qwen_jax.training.watch import WatchConfig
from tests.conftest import tiny

MODEL = tiny(num_hidden_layers=1)
PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12], [13, 14, 15]]


class Lengths:
    """Rewards: how long each answer is; the third nobody can rate."""

    metrics = {"reward/mean": 1.0}

    def __call__(self, asked, answers):
        return np.array([np.nan if place == 2 else len(ids) for place, ids in enumerate(answers)])


def collector(prompts=PROMPTS, *, length=16, stop_ids=(255, 254), rate=None, signs=None, **fields):
    sampling = SamplingConfig(**{"prompts": 2, "each": 2, "max_new_tokens": 6, **fields})
    return Collector(
        MODEL, prompts, config=sampling, length=length, stop_ids=stop_ids, num_tokens=256, layout=Layout(), seed=0,
        rate=rate or Lengths(), signs=signs or WatchConfig(), say=lambda line: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return [models.init(MODEL, jax.random.key(seed)) for seed in range(3)]


def test_rows_hold_prompt_answer_and_end_and_figures_stand_before_their_token():
    figures = [np.array(some) for some in ([-1.0, -2.0], [-3.0, -4.0], [-5.0], [-6.0])]
    rows = Answered([[5, 6], [5, 6], [7], [7]], [[8, 255], [8, 9], [10], [255]], figures, figures)
    found = collecting.as_rollout(rows, np.array([1.0, np.nan, 2.0, 4.0]), length=6, stop_ids=(255, 254), each=2)
    told = [[5, 6, 8, 255], [5, 6, 8, 9, 255], [7, 10, 255], [7, 255]]
    assert found.tokens.tolist() == [[*ids, *[0] * (6 - len(ids))] for ids in told]
    assert found.segment_ids.sum(axis=1).tolist() == [4, 5, 3, 2] and found.ends.tolist() == [3, 4, 2, 1]
    assert found.mask.tolist() == [[0, 1, 1, 0, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert found.log_probs[0].tolist() == [0, -1, -2, 0, 0, 0]
    assert found.rewards.tolist() == [1, 1, 2, 4]  # nan: what the others of its group have
    assert collecting.filled(np.array([np.nan, np.inf], np.float32), 2).tolist() == [0, 0]


def test_every_prompt_is_asked_before_any_is_asked_again():
    asked = [prompt for index in range(5) for prompt in collector().asked(index)]
    for epoch in (asked[:5], asked[5:]):
        assert sorted(epoch) == sorted(PROMPTS)
    assert asked[:5] != asked[5:]


def rollouts(source, params):
    found = []
    for some in params:
        source.see(some)
        found.append(next(source).rollout)
    return found


def test_a_rollout_one_step_behind_is_kept_in_the_checkpoint(params):
    now, behind = rollouts(collector(), params), rollouts(collector(behind=True), params)
    jax.tree.map(np.testing.assert_array_equal, behind[0], now[0])
    source = collector()  # step 1 asks its own prompts, of the policy of step 0
    source.set_state({**source.get_state(), "next_index": 1})
    jax.tree.map(np.testing.assert_array_equal, behind[1], rollouts(source, params[:1])[0])

    stopped = collector(behind=True)
    rollouts(stopped, params[:2])
    resumed = collector(behind=True)
    resumed.set_state(json.loads(json.dumps(stopped.get_state())))
    jax.tree.map(np.testing.assert_array_equal, rollouts(resumed, params[2:])[0], behind[2])
    assert resumed.metrics["reward/mean"] == 1.0 and 0 <= resumed.metrics["rollout/repetition"] <= 1


def test_slots_sample_what_all_at_once_sample(params):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        *(rollouts(collector(slots=slots), params[:1])[0] for slots in (0, 3)),
    )


def test_a_sign_of_hacking_is_told_once_and_stops_the_run_where_asked():
    told = []
    source = collector(signs=WatchConfig(window=1, stop=("kl",)))
    source._say = told.append
    source.watch(1, {"rollout/length": 5.0})
    source.watch(2, {"rollout/length": 50.0})
    again = collector(signs=WatchConfig(window=1, stop=("kl",)))
    again.set_state(json.loads(json.dumps(source.get_state())))
    again._say = told.append
    again.watch(3, {"rollout/length": 60.0})
    assert len(told) == 1 and told[0].startswith("step 2: answers have 50 tokens, 5 at first")
    with pytest.raises(InputError, match="watch.stop has kl, which shows at step 4") as error:
        again.watch(4, {"rollout/kl": 1000.0})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(prompts=[]), "there are no prompts"),
        (dict(length=8), r"prompt 0 has 3 tokens; .* does not fit into rows of 8; expected at most 1"),
        (dict(stop_ids=(255, 256)), r"stop ids are \[255, 256\]; expected one or more ids from 0 to 255"),
        (dict(stop_ids=()), r"stop ids are \[\]"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(fields, told):
    with pytest.raises(InputError, match=told) as error:
        collector(**fields)
    assert "\n" not in str(error.value)


def test_rewards_of_the_wrong_number_and_greedy_rollouts_are_one_line(params):
    class Short(Lengths):
        def __call__(self, asked, answers):
            return np.zeros(3)

    source = collector(rate=Short())
    source.see(params[0])
    with pytest.raises(InputError, match=r"the rewards of 4 answers have shape \[3\]"):
        next(source)
    with pytest.raises(InputError, match="sampling.temperature is 0"):
        SamplingConfig(temperature=0)
