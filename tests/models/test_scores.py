"""A reward model's scores: of the tokens before them and of nothing else, in float32, and the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, sharding
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout
from tests.conftest import FAMILIES, MESHES, tiny

MODEL = FAMILIES["qwen2-tied"].replace(head="score")
UNTIED = FAMILIES["qwen3"].replace(head="score")


@pytest.fixture(scope="module")
def params():
    return models.init(MODEL, jax.random.key(0))


def drawn(rows, length, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (rows, length)).astype(np.int32)


def last(scores_BT, segment_ids_BT):
    return [np.asarray(row)[np.flatnonzero(marks)[-1]] for row, marks in zip(scores_BT, segment_ids_BT, strict=True)]


def test_a_score_is_the_heads_product_with_the_hidden_state():
    config = UNTIED
    params = models.init(config, jax.random.key(1))
    assert "head" not in params and params["score"].shape == (1, config.hidden_size)
    counted = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert config.param_counts()["total"] == counted
    tokens = drawn(2, 9)
    hidden = np.asarray(models.hidden_states(config, params, tokens), np.float64)
    found = models.scores(config, params, tokens)
    assert found.dtype == jnp.float32 and found.shape == (2, 9)
    np.testing.assert_allclose(found, hidden @ np.asarray(params["score"][0], np.float64), atol=1e-5)


def test_neither_padding_nor_neighbours_in_the_row_nor_other_rows_count(params):
    texts = [drawn(1, length, seed=length)[0] for length in (5, 9)]
    alone = [models.scores(MODEL, params, text[None])[0, -1] for text in texts]
    padded = np.zeros((2, 12), np.int32)
    for tokens, segments, place in ((padded, padded.copy(), slice), (padded.copy(), padded.copy(), None)):
        for row, text in enumerate(texts):
            where = slice(0, len(text)) if place else slice(12 - len(text), 12)
            tokens[row, where], segments[row, where] = text, 1
        found = last(models.scores(MODEL, params, tokens, segment_ids=segments), segments)
        np.testing.assert_allclose(found, alone, atol=1e-5)
    packed, marks = np.concatenate(texts)[None], np.repeat([1, 2], [5, 9])[None]
    found = np.asarray(models.scores(MODEL, params, packed, segment_ids=marks))[0, [4, 13]]
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_what_comes_after_does_not_count(params):
    tokens = drawn(1, 10)
    changed = tokens.copy()
    changed[:, 6:] = 7
    before, after = (models.scores(MODEL, params, ids) for ids in (tokens, changed))
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


def test_small_differences_survive_bfloat16_activations(params):
    """The same hidden states, so any difference is the head's: its product is not rounded to bfloat16."""
    config, tokens = MODEL.replace(dtype="bfloat16"), drawn(2, 8)
    hidden = np.asarray(models.hidden_states(config, params, tokens).astype(jnp.float32), np.float64)
    found = models.scores(config, params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, hidden @ np.asarray(params["score"][0], np.float64), atol=1e-5)


@pytest.mark.parametrize("cut", ["fsdp2-context2-tensor2"])
def test_a_mesh_gives_the_scores_of_one_device(params, cut):
    layout, tokens = Layout(sharding.make_mesh(MESHES[cut])), drawn(8, 16)
    split = jax.device_put(params, sharding.tree_shardings(models.axes(MODEL), params, layout))
    found = models.scores(MODEL, split, tokens, layout=layout)
    np.testing.assert_allclose(found, models.scores(MODEL, params, tokens), atol=1e-5)


def test_lora_trains_the_head_beside_the_adapters(params):
    lora = LoraConfig(rank=2, targets=("q", "v"))
    adapters = models.lora.init(MODEL, lora, jax.random.key(2), params)
    np.testing.assert_array_equal(adapters["score"], params["score"])
    away = jax.tree.map(lambda x: x + 0.1, adapters)
    joined, tokens = models.lora.join(params, away, lora), drawn(2, 6)
    np.testing.assert_allclose(
        models.scores(MODEL, joined, tokens),
        models.scores(MODEL, models.lora.merge(params, away, lora), tokens),
        atol=1e-5,
    )
    assert np.abs(models.scores(MODEL, joined, tokens) - models.scores(MODEL, params, tokens)).max() > 0.01
    assert jax.tree.structure(models.lora.axes(MODEL, lora), is_leaf=lambda x: isinstance(x, tuple)) == (
        jax.tree.structure(adapters)
    )


def test_each_head_refuses_what_only_the_other_can(params):
    tokens = drawn(1, 4)
    with pytest.raises(InputError, match="score head in the place of the vocabulary"):
        models.sequence_log_probs(MODEL, params, tokens)
    with pytest.raises(InputError, match="no score head"):
        models.scores(tiny(), models.init(tiny(), jax.random.key(0)), tokens)
    with pytest.raises(InputError, match="head is 'reward'; expected one of vocabulary, score"):
        tiny(head="reward")
