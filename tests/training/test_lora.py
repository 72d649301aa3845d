"""A LoRA run: only adapters are trained, kept and decayed; the same on any mesh; base and adapters are read as one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretrain import language_model_loss
from qwen_jax import models, sharding
from qwen_jax.batches import Loss
from qwen_jax.config import LoraConfig
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import control_rows, optimizer, program, state
from qwen_jax.training.step import train_step
from tests.conftest import tiny
from tests.training import lm

Q_LORA = LoraConfig(rank=4, dropout=0.2, quantised="nf4", targets=("q", "o", "gate"))
LORA = LoraConfig(rank=4, dropout=0.2, dora=True, targets=("k", "o", "gate"), row_ids=(3, 200), b_rate=4.0)


def build(mesh, lora=LORA, model=lm.MODEL) -> program.Program:
    loss_fn = functools.partial(language_model_loss, model=model, layout=Layout(mesh))
    return program.build(
        init_params=functools.partial(models.lora.init, model, lora),
        param_axes=models.lora.axes(model, lora),
        frozen=[models.lora.base(model, lora, Layout(mesh))],
        loss_fn=functools.partial(loss_fn, lora=lora, dropout=0.1),
        eval_loss_fn=functools.partial(loss_fn, lora=dataclasses.replace(lora, dropout=0.0)),
        tx=optimizer.make(lm.SMOOTH, 20, rates={"b": lora.b_rate}),
        batch=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, lm.batch())),
        layout=Layout(mesh),
    )


def take(built, lora, steps=3):
    """Adapters before and after, and metrics; the base is checked to be what it was."""
    places = jax.tree.map(lambda struct: struct.sharding, built.frozen[0])
    make = lambda key: models.lora.quantise(models.init(lm.MODEL, key), lora)
    base = jax.jit(make, out_shardings=places)(jax.random.key(5))
    kept = jax.device_get(base)
    now = built.init(jax.random.key(0), base)
    first = jax.device_get(now.params)
    for seed in range(steps):
        now, metrics = built.train_step(now, sharding.put(lm.batch(seed=seed), built.batch), base)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), kept)
    return first, jax.device_get((now.params, metrics))


ALONE = MeshConfig(), jax.devices()[:1]


KINDS = {"lora": LORA, "q-lora": Q_LORA}


@pytest.fixture(scope="module", params=KINDS)
def alone(request):
    lora = KINDS[request.param]
    return lora, *take(build(sharding.make_mesh(*ALONE), lora), lora)


@pytest.mark.parametrize(
    "alone, mesh",
    [("lora", "data2-fsdp2-tensor2"), ("lora", "fsdp2-context2-tensor2"), ("q-lora", "fsdp8")],
    indirect=True,
)
def test_any_mesh_trains_adapters_like_one_device_dropout_included(alone, mesh):
    lora, expected_first, expected = alone
    first, found = take(build(mesh, lora), lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), first, expected_first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)


def test_every_adapter_moves_and_nothing_else_is_in_the_state(alone):
    lora, first, (params, _) = alone
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, params)
    assert min(jax.tree.leaves(moved)) > 1e-6
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, models.lora.abstract(lm.MODEL, lora))


def test_fewer_bits_take_less_memory_all_through_the_step():
    """The base in float32, int8 and nf4: neither what is stored nor what is temporary holds the kernels whole."""
    model = tiny(num_hidden_layers=8, hidden_size=128, intermediate_size=1024)
    size = {}
    for kind in ("", "int8", "nf4"):
        built = build(sharding.make_mesh(*ALONE), dataclasses.replace(Q_LORA, quantised=kind), model)
        plan = built.train_step.lower(built.state, built.batch, *built.frozen).compile().memory_analysis()
        size[kind] = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    kernels = sum(leaf.size for leaf in jax.tree.leaves(models.abstract(model)["layers"]) if leaf.ndim > 2)
    assert size[""] - size["int8"] > 2.5 * kernels and size["int8"] - size["nf4"] > 0.4 * kernels


def test_evaluation_drops_nothing():
    built = build(sharding.make_mesh(*ALONE))
    base = models.init(lm.MODEL, jax.random.key(5))
    adapters = models.lora.init(lm.MODEL, LORA, jax.random.key(0), base)
    found = built.eval_step(adapters, lm.batch(), base)
    expected = language_model_loss(base, lm.batch(), jax.random.key(0), model=lm.MODEL, layout=Layout())
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-5)  # adapters of step 0 change nothing


def test_each_microbatch_has_a_key_of_its_own():
    params, tx = {"w": jnp.zeros(1)}, optimizer.make(lm.SMOOTH, 20)
    start = state.create(params, jax.random.key(3), tx)
    draw = lambda params, batch, key: Loss(jax.random.uniform(key) + 0 * params["w"][0], jnp.float32(1), {})
    _, metrics = train_step(start, jnp.zeros((4, 1)), loss_fn=draw, tx=tx, microbatches=2)
    keys = [jax.random.fold_in(start.step_key(), number) for number in (0, 1)]
    np.testing.assert_allclose(metrics["loss"], np.mean([jax.random.uniform(key) for key in keys]), rtol=1e-6)


def test_b_learns_at_its_own_rate():
    """LoRA+: the first step of the same gradient, b_rate times as long for B and the same for A."""
    after = {}
    for rate in (1.0, 4.0):
        tx = optimizer.make(lm.SMOOTH, 20, rates={"b": rate})
        params = {"q": {"a": jnp.ones(3), "b": jnp.ones(3), "magnitude": jnp.ones(3)}}
        grads = jax.tree.map(lambda x: x * 0.1, params)
        updates, after_one = tx.update(grads, tx.init(params), params)
        after[rate] = updates["q"]
        np.testing.assert_allclose(optimizer.learning_rate(after_one), 5e-3)
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
