"""Models that read further than they were trained to: whole, cached, in pieces, on meshes, against a naive decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models
from qwen_jax.config import DualChunk, V1Lengths, Yarn
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout
from tests.conftest import tiny
from tests.models import oracle
from tests.models.test_decoder import perturbed, tokens

WAYS = {
    "yarn": dict(yarn=Yarn(4.0, 8)),
    "dual chunk": dict(dual_chunk=DualChunk(10, 4)),
    "dual chunk as in the paper, with temperature": dict(dual_chunk=DualChunk(10, 4, 10, "paper")),
    "dynamic NTK and LogN": dict(v1_lengths=V1Lengths(8, True, True)),
}
LENGTH, PROMPT = 29, 15


def small(**fields):
    return tiny(**{"rope_theta": 100.0, "num_hidden_layers": 2, "tie_word_embeddings": False, **fields})


def sharp(config):
    """Parameters whose attention looks at few keys, so that a wrong distance shows in the logits."""
    params = perturbed(config)
    attention = params["layers"]["attention"]
    bold = {name: {"kernel": 6 * attention[name]["kernel"], "bias": attention[name]["bias"]} for name in ("q", "k")}
    layers = params["layers"] | {
        "attention": attention | bold,
        "attention_norm": jax.tree.map(lambda x: x + 1, params["layers"]["attention_norm"]),
    }
    return params | {"layers": layers, "final_norm": {"scale": jnp.full(config.hidden_size, 2.0)}}


@pytest.fixture(params=WAYS)
def model(request):
    config = small(**WAYS[request.param])
    return config, sharp(config)


def test_logits_equal_the_naive_decoder_whole_and_behind_a_prompt(model):
    config, params = model
    ids = tokens(config, (2, LENGTH))
    plain = models.forward(small(), params, ids)
    for prompt in (None, PROMPT):
        lengths = None if prompt is None else jnp.full((2, LENGTH), prompt)
        found = models.forward(config, params, ids, prompt_lengths=lengths)
        expected = np.stack([oracle.logits(config, params, np.asarray(row), prompt) for row in ids])
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
        assert np.abs(found - plain).max() > 0.1


def empty_cache(config, rows, slots):
    kv = jnp.zeros((config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim))
    nothing = jnp.zeros((rows, slots), jnp.int32)
    return models.KVCache(kv, kv, nothing, nothing, jnp.int32(0))


def test_each_cached_step_equals_the_full_forward_at_that_position(model):
    """The prompt in three pieces, then token by token, over the borders of chunks; rows are padded on the left."""
    config, params = model
    pads = np.array([0, 4])
    ids, slots = tokens(config, (2, LENGTH)), jnp.arange(LENGTH)[None]
    positions, real = jnp.maximum(slots - pads[:, None], 0), (slots >= pads[:, None]).astype(jnp.int32)
    lengths = jnp.broadcast_to(PROMPT - pads[:, None], ids.shape)
    whole = dict(positions_BT=positions, segment_ids_BT=real, prompt_lengths_BT=lengths)
    expected = models.hidden_states(config, params, ids, **whole)
    apply, cache, start, found = jax.jit(models.Decoder(config).apply), empty_cache(config, 2, LENGTH), 0, []
    for size in (7, 6, 2, *(1,) * (LENGTH - PROMPT)):
        piece = (x[:, start : start + size] for x in (ids, positions, real))
        hidden, cache, _ = apply({"params": params}, *piece, cache, lengths[:, start : start + size])
        found.append(hidden)
        start += size
    found = jnp.concatenate(found, axis=1)
    # Logits of up to 40 enlarge roundings to about 1e-4; a distance wrong by one changes values by 5.
    np.testing.assert_allclose(found[0], expected[0], atol=2e-4)
    np.testing.assert_allclose(found[1, 4:], expected[1, 4:], atol=2e-4)


def test_packed_documents_equal_documents_alone(model):
    config, params = model
    first, second = tokens(config, (1, 13), 1), tokens(config, (1, 25), 2)
    row, ids = jnp.concatenate([first, second], axis=1), jnp.array([[3] * 13 + [1] * 25])
    packed = models.forward(config, params, row, segment_ids=ids)
    np.testing.assert_allclose(packed[:, :13], models.forward(config, params, first), atol=2e-5)
    np.testing.assert_allclose(packed[:, 13:], models.forward(config, params, second), atol=2e-5)


def loss_and_gradients(config, params, ids, **arguments):
    loss = lambda params: models.sequence_log_probs(config, params, ids, **arguments).mean()
    return jax.jit(jax.value_and_grad(loss))(params)


def test_any_mesh_and_any_back_end_train_what_one_device_trains(mesh):
    config = small(num_hidden_layers=1, dual_chunk=DualChunk(20, 8, 20), attention="blockwise")
    params, ids = sharp(config), tokens(config, (8, 64))
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 4, axis=0).repeat(32, axis=1), jnp.int32)
    expected = loss_and_gradients(config.replace(attention="reference"), params, ids, segment_ids=segments)
    found = loss_and_gradients(config, params, ids, segment_ids=segments, layout=Layout(mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_remat_changes_nothing():
    config = small(dual_chunk=DualChunk(10, 4))
    params, ids = sharp(config), tokens(config, (1, LENGTH))
    expected = loss_and_gradients(config, params, ids)
    found = loss_and_gradients(config.replace(remat="full"), params, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_rows_longer_than_the_model_reads_are_refused():
    config = small(max_position_embeddings=16)
    ids = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    with pytest.raises(InputError, match="rows of 17; the model reads at most 16"):
        jax.eval_shape(lambda params, ids: models.forward(config, params, ids), models.abstract(config), ids)
    packed = lambda params, ids: models.forward(config, params, ids, segment_ids=ids)
    assert jax.eval_shape(packed, models.abstract(config), ids).shape == (1, 17, 256)


def test_a_cache_without_room_is_refused():
    config = small(num_hidden_layers=1)
    params, ids = sharp(config), tokens(config, (1, 6))
    read = lambda cache, ids: models.Decoder(config).apply({"params": params}, ids, ids * 0, ids * 0 + 1, cache)[1]
    with pytest.raises(InputError, match="5 slots, 0 of them written; no room for 6 more"):
        jax.eval_shape(read, empty_cache(config, 1, 5), ids)
    with pytest.raises(InputError, match="8 slots, 6 of them written; no room for 3 more"):
        read(read(empty_cache(config, 1, 8), ids), ids[:, :3])
