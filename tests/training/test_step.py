"""The one train step: exact under accumulation, any mesh and bad numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretrain import language_model_loss
from qwen_jax import sharding
from qwen_jax.batches import LMBatch, Loss
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import optimizer
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.state import create
from qwen_jax.training.step import train_step
from tests.training import lm

ONE = lambda: sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def put(built, batch):
    return sharding.put(batch, built.batch)


def take(built, count=3):
    """State and metrics after a few steps on different batches."""
    state = built.init(jax.random.key(0))
    for seed in range(count):
        state, metrics = built.train_step(state, put(built, lm.batch(seed=seed)))
    return jax.device_get(state), jax.device_get(metrics)


def assert_same(found, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@pytest.fixture(scope="module")
def whole():
    return take(lm.build(ONE()))


# Two, and one row each, of which the last has nothing to learn; what lies between is the same loop.
@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulation_equals_the_whole_batch_however_uneven_the_masks(whole, microbatches):
    state, metrics = take(lm.build(ONE(), microbatches=microbatches))
    assert_same(state.params, whole[0].params, atol=5e-6)
    assert_same(metrics, whole[1], atol=5e-6)


def test_any_mesh_trains_like_one_device(whole, mesh):
    state, metrics = take(lm.build(mesh))
    assert_same(state.params, whole[0].params, atol=5e-6)
    assert_same(metrics, whole[1], atol=5e-6)


def test_the_step_is_adamw_on_the_mean_over_learned_tokens():
    """One step against a by-hand AdamW on the gradient of the plain masked mean."""
    config = OptimizerConfig(peak_lr=1e-2, weight_decay=0.1, clip_norm=0.05, eps=1e-3)
    built, batch = lm.build(ONE(), config=config), lm.batch()
    before = built.init(jax.random.key(0))
    old = jax.device_get(before.params)

    def mean(params):
        loss = language_model_loss(params, batch, jax.random.key(0), model=lm.MODEL, layout=Layout())
        return loss.total / batch.loss_mask.sum()

    loss, grads = jax.value_and_grad(mean)(before.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert norm > config.clip_norm  # or this would not test clipping

    def by_hand(path, p, g):
        g = g * config.clip_norm / norm
        update = g / (np.abs(g) + config.eps)  # both moments are exact after bias correction on the first step
        decay = 0.0 if path[-1].key in ("bias", "scale") else config.weight_decay
        return p - config.peak_lr * (update + decay * p)

    expected = jax.tree_util.tree_map_with_path(by_hand, old, jax.device_get(grads))
    after, metrics = built.train_step(before, batch)
    assert_same(jax.device_get(after.params), expected, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["weight"] == batch.loss_mask.sum()


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    def poisoned(params, batch, key):
        loss = language_model_loss(params, batch, key, model=lm.MODEL, layout=Layout())
        return loss._replace(total=loss.total * jnp.where(jnp.sum(batch.tokens[0]) == 0, jnp.nan, 1.0))

    built = lm.build(ONE(), loss_fn=poisoned)
    state, good = built.train_step(built.init(jax.random.key(0)), lm.batch())
    kept = jax.device_get(state)
    bad = lm.batch(seed=1)
    bad.tokens[0] = 0
    state, metrics = built.train_step(state, bad)
    assert (good["skipped"], metrics["skipped"]) == (0.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), kept[1:3])
    assert int(state.step) == 2
    state, metrics = built.train_step(state, lm.batch(seed=2))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0.0


def test_an_update_that_is_not_finite_is_skipped_though_loss_and_gradient_are():
    built = lm.build(ONE(), config=OptimizerConfig(peak_lr=3e38, weight_decay=3e38))
    state = built.init(jax.random.key(0))
    kept = jax.device_get(state.params)
    state, metrics = built.train_step(state, lm.batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), kept)


def test_a_batch_with_nothing_to_learn_moves_nothing_but_decay():
    built = lm.build(ONE(), config=OptimizerConfig(peak_lr=1e-2, weight_decay=0.0))
    state = built.init(jax.random.key(0))
    kept = jax.device_get(state.params)
    empty = lm.batch()._replace(loss_mask=np.zeros((8, 16), np.float32))
    state, metrics = built.train_step(state, empty)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), kept)
    assert (metrics["loss"], metrics["weight"]) == (0.0, 0.0)


def test_the_state_is_donated_and_lies_where_its_parameters_lie():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    built = lm.build(mesh)
    memory = built.train_step.lower(built.state, built.batch).compile().memory_analysis()
    held = sum(
        np.prod(struct.sharding.shard_shape(struct.shape)) * struct.dtype.itemsize
        for struct in jax.tree.leaves(built.state)
    )
    assert memory.alias_size_in_bytes >= held
    adam = built.state.opt_state[1]
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, adam.mu, built.state.params)
    assert all(jax.tree.leaves(same))


def test_a_long_run_on_one_batch_learns_it():
    built = lm.build(ONE(), steps=40, config=OptimizerConfig(peak_lr=1e-2, warmup_steps=2))
    state, batch = built.init(jax.random.key(0)), lm.batch()
    for _ in range(40):
        state, metrics = built.train_step(state, batch)
    assert 0 <= metrics["loss"] < 0.1


@pytest.mark.parametrize(
    "mesh_config, microbatches, rows, message",
    [
        (MeshConfig(fsdp=8), 2, 8, "batch_size 8 / microbatches 2 = 4 rows.*multiple of 8"),
        (MeshConfig(fsdp=8), 3, 8, "batch_size 8 cannot be cut into 3 microbatches"),
        (MeshConfig(fsdp=2, tensor=4), 1, 8, "k/bias: axis 'kv_heads' of size 2 .*tensor=4.*multiple of 4"),
    ],
)
def test_a_mesh_that_does_not_divide_is_told_what_and_by_how_much(mesh_config, microbatches, rows, message):
    with pytest.raises(InputError, match=message):
        lm.build(sharding.make_mesh(mesh_config), microbatches=microbatches, rows=rows)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_tally_is_the_sum_over_the_microbatches_before(microbatches):
    """The loss of a microbatch of row sums r after tallies t is w r + t: its total is known in closed form."""

    def loss(params, batch, key, tally=None):
        sum_of_rows = jnp.sum(batch.loss_mask)
        before = 0.0 if tally is None else tally
        return Loss(jnp.sum(params["kernel"]) * sum_of_rows + before, jnp.float32(1), {}, sum_of_rows)

    tx, batch = optimizer.make(lm.SMOOTH, 5), LMBatch(*(np.arange(8, dtype=np.float32)[:, None],) * 5)
    state = create({"kernel": jnp.ones(3)}, jax.random.key(0), tx)
    metrics = train_step(state, batch, loss_fn=loss, tx=tx, microbatches=microbatches)[1]
    parts = [np.arange(8.0)[i::microbatches].sum() for i in range(microbatches)]
    assert metrics["loss"] == sum(3 * part + sum(parts[:i]) for i, part in enumerate(parts)) / microbatches
