"""The registry holds the published sizes; bad values are refused by name."""

import math

import jax
import pytest

from qwen_jax import config, models
from qwen_jax.errors import InputError

# Total and non-embedding parameters as published on the model cards (qwen2.5 shares qwen2's shapes).
PUBLISHED = {
    "qwen2-0.5b": (494_032_768, 357_898_112),
    "qwen2-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2-7b": (7_615_616_512, 6_525_621_760),
    "qwen2-72b": (72_706_203_648, 70_214_787_072),
    "qwen2.5-3b": (3_085_938_688, 2_774_773_760),
    "qwen2.5-14b": (14_770_033_664, 13_212_898_304),
    "qwen2.5-32b": (32_763_876_352, 31_206_740_992),
    "qwen3-0.6b": (596_049_920, 440_467_456),
    "qwen3-1.7b": (1_720_574_976, 1_409_410_048),
    "qwen3-4b": (4_022_468_096, 3_633_511_936),
    "qwen3-8b": (8_190_735_360, 6_946_075_648),
    "qwen3-14b": (14_768_307_200, 13_212_482_560),
    "qwen3-32b": (32_762_123_264, 31_206_298_624),
}


@pytest.mark.parametrize("name", config.names())
def test_counts_are_those_of_the_parameters_and_of_the_model_card(name):
    counts = config.get(name).param_counts()
    assert counts["total"] == sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract(config.get(name))))
    published = PUBLISHED.get(name, PUBLISHED.get(name.replace("qwen2.5", "qwen2")))
    assert (counts["total"], counts["non_embedding"]) == published
    assert counts["active"] == counts["total"]


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(InputError, match="'qwen2.5-7B'.*qwen2.5-7b"):
        config.get("qwen2.5-7B")


def test_an_unknown_field_is_told_the_nearest():
    with pytest.raises(InputError, match="num_layers.*num_hidden_layers"):
        config.get("qwen2-7b").replace(num_layers=3)


@pytest.mark.parametrize(
    "field, value",
    [("hidden_size", 0), ("num_key_value_heads", 3), ("head_dim", 7), ("dtype", "float8"), ("remat", "some")],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        config.get("qwen2-0.5b").replace(**{field: value})
