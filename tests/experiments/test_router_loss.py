"""The router's loss in training: added as said, the same on any mesh, with counts that run over microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pretrain
from experiments.pretrain import RouterLoss, language_model_loss
from qwen_jax import models, sharding
from qwen_jax.objectives import balance
from qwen_jax.sharding import Layout, MeshConfig
from tests.conftest import MOE_FAMILIES
from tests.training import lm

MODEL = MOE_FAMILIES["qwen3-moe"].replace(num_hidden_layers=1)


def config(**changes):
    base = dataclasses.replace(pretrain.smoke(), model=MODEL, length=16, optimizer=lm.SMOOTH, **changes)
    return base


def trained(config, mesh, steps=2):
    built = pretrain.build(config, mesh)
    state = built.init(jax.random.key(0))
    for seed in range(steps):
        state, metrics = built.train_step(state, sharding.put(lm.batch(seed=seed), built.batch))
    return jax.device_get((state.params, metrics))


ONE = lambda: sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("kind", balance.KINDS)
def test_it_is_added_with_its_weights(kind):
    params, batch = models.init(MODEL, jax.random.key(0)), jax.tree.map(jnp.asarray, lm.batch())
    loss = lambda router: language_model_loss(params, batch, None, model=MODEL, layout=Layout(), router=router)
    plain, both = loss(None), loss(RouterLoss(kind, weight=0.3, z_weight=0.2))
    metrics = {name: value / both.weight for name, value in both.metrics.items()}
    expected = metrics["nll"] + 0.3 * metrics["balance"] + 0.2 * metrics["router_z"]
    np.testing.assert_allclose(both.total / both.weight, expected, rtol=1e-5)
    np.testing.assert_allclose(plain.total / plain.weight, metrics["nll"], rtol=1e-5)
    assert metrics["balance"] >= 0.95 * MODEL.num_experts_per_tok and metrics["overload"] > 1


def test_a_mesh_with_split_experts_trains_like_one_device():
    how = dict(router=RouterLoss(weight=0.1, z_weight=0.01), microbatches=2)
    expected = trained(config(**how), ONE())
    found = trained(config(**how, mesh=MeshConfig(expert=2, fsdp=2)), sharding.make_mesh(
        MeshConfig(expert=2, fsdp=2), jax.devices()[:4]
    ))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_the_shares_of_a_step_run_over_its_microbatches():
    """Against the two microbatches' losses computed apart, with the first one's counts handed to the second."""
    params = models.init(MODEL, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, lm.batch())
    total, weight, before = 0.0, 0.0, None
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i::2], batch)
        loss = language_model_loss(
            params, part, None, before, model=MODEL, layout=Layout(), router=RouterLoss(weight=1)
        )
        total, weight, before = total + loss.total, weight + loss.weight, loss.tally
    metrics = trained(config(router=RouterLoss(weight=1.0), microbatches=2), ONE(), steps=1)[1]
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-5)
    apart = trained(config(router=RouterLoss("per-layer", weight=1.0), microbatches=2), ONE(), steps=1)[1]
    assert abs(apart["loss"] - metrics["loss"]) > 1e-4
