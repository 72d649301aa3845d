"""Packing costs nothing: a packed batch has the loss and the gradients of its conversations one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretrain import language_model_loss
from qwen_jax import models, sharding
from qwen_jax.batches import LMBatch
from qwen_jax.data.packing import PackedRows
from qwen_jax.sharding import Layout, MeshConfig
from tests.conftest import tiny
from tests.data import made_up

MODELS = {"qwen2": tiny(), "qwen3": tiny(qkv_bias=False, qk_norm=True)}


def batch(documents, length):
    rows = list(PackedRows(documents, length))
    return LMBatch(*(jnp.stack(arrays) for arrays in zip(*rows, strict=True)))


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_conversations_one_by_one(name):
    model = MODELS[name]
    documents = made_up.documents([9, 30, 14, 5, 21, 2, 32], vocab=256)
    params = models.init(model, jax.random.key(0))
    layout = Layout(sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1]))
    loss = functools.partial(language_model_loss, key=jax.random.key(1), model=model, layout=layout)

    @jax.jit
    def total_and_gradient(params, batch):
        def total(params):
            found = loss(params, batch)
            return found.total, found.weight

        return jax.value_and_grad(total, has_aux=True)(params)

    packed = batch(documents, 32)
    assert len(packed.tokens) < len(documents)
    (found, weight), gradient = total_and_gradient(params, packed)
    alone = [total_and_gradient(params, batch([document], 32)) for document in documents]
    np.testing.assert_allclose(found, sum(total for (total, _), _ in alone), rtol=1e-5)
    assert weight == sum(weight for (_, weight), _ in alone)
    expected = jax.tree.map(lambda *parts: sum(parts), *(gradient for _, gradient in alone))
    # Sums of float32 in another order: a few units of the last place of the largest summand.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-3), gradient, expected)
