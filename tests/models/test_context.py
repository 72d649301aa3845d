"""Context parallelism: a sequence split over devices gives what one device gives, with as much work on each of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding
from qwen_jax.models import attend
from qwen_jax.ops import blocks
from qwen_jax.sharding import Layout, MeshConfig
from tests.conftest import tiny
from tests.ops.test_attention import TOLERANCE, arrays, marks

SPLIT = {
    "context8": MeshConfig(fsdp=1, context=8),
    "context4-tensor2": MeshConfig(fsdp=1, context=4, tensor=2),
    "fsdp4-context2": MeshConfig(fsdp=4, context=2),
}
ROWS, LENGTH, STRIDE = 4, 8 * 34, 64  # halves of 17: no block, chunk or document ends with a half
WAYS = {None: 0, STRIDE: 1}  # plain attention, dual chunk attention


@pytest.fixture(params=SPLIT)
def split(request):
    return Layout(sharding.make_mesh(SPLIT[request.param]))


def found(layout, inputs, seen_by, stride):
    """Returns the output and the gradients of q, k and v."""
    *inputs, cotangent = inputs
    run = lambda *x: attend.attend(*x, seen_by, backend="blockwise", layout=layout, stride=stride)
    out, back = jax.vjp(run, *inputs)
    return out, *back(cotangent)


@pytest.mark.parametrize("stride", WAYS, ids=("plain", "dual chunk"))
def test_output_and_gradients_are_those_of_one_device(split, stride):
    """Packed rows with padding behind them; four query heads on two kv heads."""
    q, k, v, cotangent, _ = arrays(0, ROWS, LENGTH, LENGTH, 4, 2, 8)
    if stride:
        q = np.stack([q, 0.7 * q[::-1], 0.4 * q[:, ::-1]])
    seen_by = marks(1, "packed", ROWS, LENGTH, LENGTH)
    run = jax.jit(found, static_argnums=(0, 3))
    alone = run(Layout(), (q, k, v, cotangent), seen_by, stride)
    for ours, expected in zip(run(split, (q, k, v, cotangent), seen_by, stride), alone, strict=True):
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_causal_work_is_the_same_on_every_device(monkeypatch):
    """Pairs of blocks of 16 that are computed; without the trade the last device would have 15 times the first's."""
    layout, length, size = Layout(sharding.make_mesh(SPLIT["context8"])), 8 * 32, 16

    def count(q, k, v, *, q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, **how):
        queries = blocks.cut(q_positions_BT, q_segment_ids_BT, size)
        keys = blocks.cut(kv_positions_BS, kv_segment_ids_BS, size)
        pairs = blocks.seen(queries, keys, True).sum().astype(q.dtype)
        return jnp.broadcast_to(pairs, q.shape), None

    positions = jnp.arange(length)[None]
    ones, heads = jnp.ones_like(positions), jnp.zeros((1, length, 1, 2))
    run = lambda: attend.attend(heads, heads, heads, (positions, positions, ones, ones), backend="auto", layout=layout)
    monkeypatch.setattr(attend, "attention", count)
    total = (length // size) * (length // size + 1) / 2
    np.testing.assert_array_equal(run(), total / 8)
    monkeypatch.setattr(attend, "trade_halves", lambda x, *where: x)
    np.testing.assert_array_equal(run()[0, :: length // 8, 0, 0], [1 + 2 + 4 * i for i in range(8)])


@pytest.fixture(scope="module")
def compiled():
    """The gradient of a model's loss over 8 devices that share one sequence, and its length: no other size is it."""
    length = 8 * 136
    config = tiny(num_hidden_layers=3, max_position_embeddings=length, attention="blockwise", vocab_size=512)
    layout = Layout(sharding.make_mesh(SPLIT["context8"]))
    loss = lambda params, ids: models.sequence_log_probs(config, params, ids, layout=layout).mean()
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=layout.sharding(("batch", "length"), (1, length)))
    return jax.jit(jax.grad(loss)).lower(models.abstract(config), ids).compile().as_text(), length, config


def test_a_device_holds_its_part_of_the_length_only_but_for_the_keys_of_one_layer(compiled):
    program, length, config = compiled
    shapes = {tuple(map(int, text.split(","))) for text in re.findall(r"f32\[([\d,]+)\]", program)}
    whole = {shape for shape in shapes if length in shape}
    K, H = config.num_key_value_heads, config.head_dim
    assert {tuple(sorted(set(shape) - {1, length})) for shape in whole} == {(K, H)}


def test_gradients_of_keys_are_reduced_and_scattered(compiled):
    program, length, config = compiled
    part = rf"f32\[1,{length // 8},{config.num_key_value_heads},{config.head_dim}\]"
    assert len(re.findall(rf"= {part}\S* reduce-scatter\(", program)) == 2
