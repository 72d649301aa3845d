"""A step of PPO is the same on a mesh, and does what its parts do one by one; what is not finite is not learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo, ppo
from qwen_jax import models, objectives, sharding
from qwen_jax.batches import LMBatch, Rollout
from qwen_jax.eval import reinforcing
from qwen_jax.objectives import divergence
from qwen_jax.training import lessons
from qwen_jax.training.lessons import Experience, Moments, UpdatesConfig
from tests.conftest import MESHES
from tests.training.lm import SMOOTH

ROWS, LENGTH = 8, 32
SMOKE = ppo.smoke()
CONFIG = dataclasses.replace(
    SMOKE, model=SMOKE.model.replace(vocab_size=64, num_hidden_layers=1), optimizer=SMOOTH, value_optimizer=SMOOTH,
    length=LENGTH, loop=dataclasses.replace(SMOKE.loop, steps=10), mixing=ppo.Mixing("made-up", rows=8, length=LENGTH),
    updates=UpdatesConfig(epochs=2, minibatches=1, value_only=1, rewards="centred", truncate=2.0),
)  # fmt: skip


def rollout(seed=0) -> Rollout:
    """Answers of one to nine tokens to prompts of three to six; those of the last row nobody could rate."""
    draw = np.random.default_rng(seed)
    asked, answered = draw.integers(3, 7, ROWS), draw.integers(1, 10, ROWS)
    place = np.arange(LENGTH)[None]
    real = place < (asked + answered)[:, None]
    mask = ((place >= asked[:, None] - 1) & (place < (asked + answered)[:, None] - 1)).astype(np.float32)
    mask[-1] = 0
    tokens = np.where(real, draw.integers(1, 64, (ROWS, LENGTH)), 0).astype(np.int32)
    log_probs = (mask * draw.normal(-4, 0.1, mask.shape)).astype(np.float32)
    rewards = draw.normal(1, 2, ROWS).astype(np.float32)
    return Rollout(
        tokens, real.astype(np.int32), mask, log_probs, log_probs, (asked + answered - 1).astype(np.int32), rewards
    )


def text(updates=CONFIG.updates.each_step) -> LMBatch:
    draw = np.random.default_rng(1)
    tokens = draw.integers(1, 64, (8 * updates, LENGTH + 1)).astype(np.int32)
    ones = np.ones((len(tokens), LENGTH), np.int32)
    return LMBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, np.cumsum(ones, 1, np.int32) - 1)


def begun(config, mesh):
    """The program, its frozen models and its first state."""
    built = ppo.build(config, mesh)
    frozen = reinforcing.frozen_params(config, None, built, None)
    return built, frozen, ppo.first_state(config, built, frozen, None)


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


def two_steps(mesh):
    built, frozen, state = begun(CONFIG, mesh)
    told = []
    for seed in range(2):
        batch = sharding.put(Experience(rollout(seed), text()), built.batch)
        state, metrics = built.train_step(state, batch, *frozen)
        told.append(jax.device_get(metrics))
    return jax.device_get(state), told


@pytest.fixture(scope="module")
def alone():
    return two_steps(one_device())


def test_steps_on_a_mesh_are_those_of_one_device(alone):
    expected, told = alone
    found, metrics = two_steps(sharding.make_mesh(MESHES["fsdp2-context2-tensor2"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), found, expected)
    for got, want in zip(metrics, told, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name


def test_the_first_ratio_of_every_step_is_one_and_the_critic_learns_alone_at_first(alone):
    _, told = alone
    assert [metrics["policy/updates"] for metrics in told] == [1, 2]
    for metrics in told:
        assert metrics["policy/first_ratio_gap"] <= 1e-5
    assert abs(told[1]["policy/ratio_max"] - 1) > 1e-4  # the second update of the step has moved
    seen = rollout(0).mask.sum()
    assert told[0]["weight"] == seen and told[0]["value/weight"] == 2 * seen


def test_a_step_is_its_parts_one_by_one():
    """One update of all rows: advantages, loss and their gradient, by hand, and through the optimizer."""
    config = dataclasses.replace(
        CONFIG, updates=UpdatesConfig(), mixing=ppo.Mixing(), clipped=ppo.Clipped(whiten=False)
    )
    built, frozen, state = begun(config, one_device())
    batch = rollout()
    params, critic, held = jax.device_get((state.params, state.value.params, frozen[0]))
    targets = np.roll(batch.tokens, -1, axis=1)
    of = lambda params: models.log_probs(config.model, params, batch.tokens, targets, segment_ids=batch.segment_ids)
    scorer = config.model.replace(head="score")
    scores = lambda params: models.scores(scorer, params, batch.tokens, segment_ids=batch.segment_ids)
    raw_B = batch.rewards + np.asarray(scores(held["reward"]))[np.arange(ROWS), batch.ends]
    kl_BT = of(params) - of(held["reference"])
    rewards_BT = objectives.ppo.token_rewards(jnp.asarray(raw_B), kl_BT, batch.mask, kl_coef=0.04)
    advantages_BT, returns_BT = objectives.ppo.advantages(rewards_BT, scores(critic), batch.mask)
    loss = lambda params: objectives.ppo.policy_loss(of(params), of(held["reference"]), advantages_BT, batch.mask)[0]
    value, grads = jax.value_and_grad(loss)(params)
    step, metrics = built.train_step(state, sharding.put(Experience(batch), built.batch), *frozen)
    assert metrics["loss"] == pytest.approx(float(value), abs=1e-5)
    norm = np.sqrt(sum(float(np.sum(np.square(grad))) for grad in jax.tree.leaves(grads)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    error = objectives.ppo.value_loss(scores(critic), scores(critic), returns_BT, batch.mask)[0]
    assert metrics["value/loss"] == pytest.approx(float(error), rel=1e-4)
    assert metrics["rollout/reward"] == pytest.approx(raw_B[:-1].mean(), abs=1e-5)
    assert metrics["rollout/reward_errors"] == pytest.approx(1 / ROWS)
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(step.params), params)
    down = jax.tree.map(lambda a, b: float(np.sum(a * b)), moved, grads)
    assert sum(jax.tree.leaves(down)) < 0

    # What is not finite is not learned, and the state that would be saved stays what it was.
    kept = jax.device_get((step.params, step.value.params))
    batch.rewards[0] = np.nan
    step, metrics = built.train_step(step, sharding.put(Experience(batch), built.batch), *frozen)
    assert metrics["skipped"] > 0 and step.step == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((step.params, step.value.params)), kept)
    assert np.isfinite(step.moments.mean)


@pytest.mark.parametrize("how", ["as-is", "centred", "scaled"])
def test_rewards_are_less_the_mean_of_all_so_far(how):
    draw = np.random.default_rng(0)
    moments, every = Moments(*(jnp.float32(0),) * 3), []
    for size in (5, 2, 9):
        some, seen = (100 + draw.normal(0, 3, size)).astype(np.float32), draw.random(size) < 0.7
        every += some[seen].tolist()
        moments, found = lessons.normalised(moments, jnp.asarray(some), jnp.asarray(seen), how)
        shift = 0 if how == "as-is" else np.mean(every)
        scale = np.std(every) if how == "scaled" else 1
        np.testing.assert_allclose(found, (some - shift) / scale, rtol=1e-3, atol=1e-3)
    assert moments.count == len(every)


def test_an_importance_weight_is_the_ratio_of_probabilities_and_is_cut():
    found = lessons.importance(jnp.log(jnp.array([0.2, 0.9])), jnp.log(jnp.array([0.4, 0.1])), 3.0)
    np.testing.assert_allclose(found, [0.5, 3.0], rtol=1e-6)


def test_the_weight_of_the_distance_is_steered_to_its_target():
    steer = lambda kl: float(divergence.adapted(0.1, kl, target=6.0, horizon=100.0, answers=50))
    assert steer(6.0) == pytest.approx(0.1)
    assert steer(6.6) == pytest.approx(0.1 * 1.05) and steer(60.0) == pytest.approx(0.1 * 1.1)
    assert steer(0.0) == pytest.approx(0.1 * 0.9)


def test_groups_that_agree_are_left_out_where_asked():
    scores = jnp.array([1.0, 1.0, 0.0, 2.0])
    ones = jnp.ones((4, 3))
    lesson = lessons.Lesson(ones, ones, ones, ones, (), ones, (), ())
    found = grpo.credit(scores, lesson, 0.0, how=grpo.Grouped(scale="none", skip_agreeing=True), each=2)
    np.testing.assert_array_equal(found.mask, [[0] * 3] * 2 + [[1] * 3] * 2)
    np.testing.assert_allclose(found.advantages, [[0] * 3] * 2 + [[-1] * 3, [1] * 3])
