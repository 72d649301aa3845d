"""A LoRA run: only adapters are trained, kept and decayed; the same on any mesh; base and adapters are read as one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretrain import language_model_loss
from qwen_jax import models, sharding
from qwen_jax.config import LoraConfig
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import control_rows, optimizer, program
from tests.training import lm

LORA = LoraConfig(rank=4, dropout=0.2, dora=True, row_ids=(3, 200), b_rate=4.0)


def build(mesh, lora=LORA, *, microbatches=1, dropout=0.1) -> program.Program:
    loss_fn = functools.partial(language_model_loss, model=lm.MODEL, layout=Layout(mesh))
    return program.build(
        init_params=functools.partial(models.lora.init, lm.MODEL, lora),
        param_axes=models.lora.axes(lm.MODEL, lora),
        frozen=[(models.abstract(lm.MODEL), models.axes(lm.MODEL))],
        loss_fn=functools.partial(loss_fn, lora=lora, dropout=dropout),
        eval_loss_fn=functools.partial(loss_fn, lora=LoraConfig(rank=4, dora=True, row_ids=(3, 200))),
        tx=optimizer.make(lm.SMOOTH, 20, rates={"b": lora.b_rate}),
        batch=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, lm.batch())),
        layout=Layout(mesh),
        microbatches=microbatches,
    )


def take(built, steps=3):
    """Adapters before and after, metrics and the evaluation, and whether the base is what it was."""
    base = models.init(lm.MODEL, jax.random.key(5), mesh=built.layout.mesh)
    kept = jax.device_get(base)
    state = built.init(jax.random.key(0), base)
    first = jax.device_get(state.params)
    for seed in range(steps):
        state, metrics = built.train_step(state, sharding.put(lm.batch(seed=seed), built.batch), base)
    score = built.eval_step(state.params, sharding.put(lm.batch(), built.batch), base)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), kept)
    return first, jax.device_get((state.params, metrics, score.total))


@pytest.fixture(scope="module")
def alone():
    return take(build(sharding.make_mesh(MeshConfig(), jax.devices()[:1])))


def test_any_mesh_trains_adapters_like_one_device_dropout_included(alone, mesh):
    first, found = take(build(mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), first, alone[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, alone[1])


def test_every_adapter_moves_and_nothing_else_is_in_the_state(alone):
    first, (params, *_) = alone
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, params)
    assert min(jax.tree.leaves(moved)) > 1e-6
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, models.lora.abstract(lm.MODEL, LORA))


def test_dropout_draws_anew_for_each_microbatch():
    """Two equal halves: without dropout cutting changes nothing, with it the halves no longer drop the same."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    half = lm.batch(rows=4)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), half)  # row r goes to microbatch r % 2
    base = models.init(lm.MODEL, jax.random.key(5), mesh=mesh)

    def norm(microbatches, rate):
        built = build(mesh, LoraConfig(rank=4), microbatches=microbatches, dropout=rate)
        return built.train_step(built.init(jax.random.key(0), base), twice, base)[1]["loss"]

    np.testing.assert_allclose(norm(2, 0.0), norm(1, 0.0), rtol=1e-6)
    # The first microbatch draws with the key of a step that is not cut: equal draws in both would give its loss.
    built = build(mesh, LoraConfig(rank=4), dropout=0.5)
    key = jax.random.fold_in(built.init(jax.random.key(0), base).step_key(), 0)
    adapters = models.lora.init(lm.MODEL, LoraConfig(rank=4), jax.random.key(0), base)
    loss = language_model_loss(
        adapters, half, key, base, model=lm.MODEL, layout=Layout(), lora=LoraConfig(rank=4), dropout=0.5
    )
    assert abs(float(norm(2, 0.5) - loss.total / loss.weight)) > 1e-3


def test_b_learns_at_its_own_rate():
    """LoRA+: the first step of the same gradient, b_rate times as long for B and the same for A."""
    after = {}
    for rate in (1.0, 4.0):
        tx = optimizer.make(lm.SMOOTH, 20, rates={"b": rate})
        params = {"q": {"a": jnp.ones(3), "b": jnp.ones(3), "magnitude": jnp.ones(3)}}
        grads = jax.tree.map(lambda x: x * 0.1, params)
        updates, state = tx.update(grads, tx.init(params), params)
        after[rate] = updates["q"]
        np.testing.assert_allclose(optimizer.learning_rate(state), 5e-3)
    np.testing.assert_allclose(after[4.0]["b"], 4 * after[1.0]["b"], rtol=1e-6)
    np.testing.assert_array_equal(after[4.0]["a"], after[1.0]["a"])
    assert np.all(np.abs(after[1.0]["magnitude"]) < np.abs(after[1.0]["a"]))  # lengths are not decayed


def table(rows=60, width=32):
    return np.random.default_rng(0).normal(0, 1, (rows, width)).astype(np.float32)


def test_rows_that_no_text_used_are_told_by_length_twin_or_padding():
    drawn = table()
    untrained = functools.partial(control_rows.untrained, used=50, among=(10, 11, 12))
    assert not any(untrained(drawn, row) for row in range(50))
    small = drawn.copy()
    small[10] *= 0.01
    assert untrained(small, 10) and not untrained(small, 11)
    twin = drawn.copy()
    twin[10] = twin[11]
    assert untrained(twin, 10) and untrained(twin, 11) and not untrained(twin, 12)
    pushed = drawn.copy()
    pushed[50:] = 0.1 * pushed[50:] + 3.0  # what a softmax does to rows that are never the target
    pushed[10] = 0.1 * pushed[10] + 2.5
    assert untrained(pushed, 10) and not any(untrained(pushed, row) for row in range(11, 50))
