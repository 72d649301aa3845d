"""Dropout keeps the mean, draws anew for each key, layer and place, and is the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import models, sharding
from qwen_jax.ops.dropout import Dropout, drop, drop_adapter
from qwen_jax.sharding import Layout
from tests.conftest import tiny


def test_the_share_that_is_dropped_and_the_mean():
    x = jnp.full((400, 100), 3.0)
    found = np.asarray(drop(x, Dropout(jax.random.key(0), rate=0.3), "here"))
    assert set(np.unique(found).round(5)) == {0.0, np.float32(3.0 / 0.7).round(5)}
    assert abs((found == 0).mean() - 0.3) < 0.01  # 4 standard deviations of 40,000 draws
    assert drop(x, Dropout(jax.random.key(0)), "here") is x and drop(x, None, "here") is x


def test_places_layers_and_keys_draw_apart():
    ones, dropout = jnp.ones((64, 64)), Dropout(jax.random.key(0), rate=0.5, adapter_rate=0.5)
    layers = dropout.split(2)
    layer = lambda i: Dropout(layers.key[i], 0.5)
    draws = [
        drop(ones, dropout, "a"), drop(ones, dropout, "b"), drop_adapter(ones, dropout, "a"),
        drop(ones, layer(0), "a"), drop(ones, layer(1), "a"), drop(ones, Dropout(jax.random.key(1), rate=0.5), "a"),
    ]  # fmt: skip
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert 0.4 < float((a == b).mean()) < 0.6


def test_a_model_drops_embeddings_and_what_layers_add(mesh):
    config = tiny()
    params, key = models.init(config, jax.random.key(0)), jax.random.key(2)
    ids = np.random.default_rng(0).integers(0, 256, (8, 16)).astype(np.int32)
    targets, dropout = np.roll(ids, -1, 1), Dropout(key, rate=0.3)
    alone = models.log_probs(config, params, ids, targets, dropout=dropout)
    assert np.abs(alone - models.log_probs(config, params, ids, targets)).max() > 0.1
    layout = Layout(mesh)
    split = jax.device_put(params, sharding.tree_shardings(models.axes(config), params, layout))
    put = lambda x: jax.device_put(x, layout.sharding(("batch", "length"), x.shape))
    found = models.log_probs(config, split, put(ids), put(targets), layout=layout, dropout=dropout)
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_at_a_rate_near_1_only_zeros_are_added():
    """Nothing of the embedding or the layers is left, so the final norm sees zeros: every token is as likely."""
    config = tiny()
    params = models.init(config, jax.random.key(0))
    ids = jnp.ones((1, 8), jnp.int32)
    found = models.log_probs(config, params, ids, ids, dropout=Dropout(jax.random.key(0), rate=1 - 1e-7))
    np.testing.assert_allclose(found, -np.log(256), atol=1e-5)
