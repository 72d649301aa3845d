"""The registry holds the published sizes; bad values are refused by name."""

import dataclasses
import json
import math

import jax
import pytest

from qwen_jax import config, models
from qwen_jax.errors import InputError

# Total and non-embedding parameters as published on the model cards. Shapes that came back: see SAME_SHAPE.
PUBLISHED = {
    "qwen-1.8b": (1_836_828_672, 1_214_498_816),
    "qwen-7b": (7_721_324_544, 6_476_664_832),
    "qwen-14b": (14_167_290_880, 12_610_155_520),
    "qwen-72b": (72_287_920_128, 69_796_503_552),
    "qwen1.5-0.5b": (463_987_712, 308_405_248),
    "qwen1.5-4b": (3_950_369_280, 3_172_456_960),
    "qwen1.5-32b": (32_512_218_112, 30_955_082_752),
    "qwen1.5-110b": (111_209_914_368, 108_718_497_792),
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
    "qwen1.5-moe-a2.7b": (14_315_784_192, 13_693_454_336),
    "qwen2-57b-a14b": (57_408_658_944, 56_319_581_696),
    "qwen3-30b-a3b": (30_532_122_624, 29_909_792_768),
    "qwen3-235b-a22b": (235_093_634_560, 233_848_974_848),
}

# Of the models with experts, what one token passes through: with all embeddings, and without.
ACTIVE = {
    "qwen1.5-moe-a2.7b": (2_689_173_504, 2_066_843_648),
    "qwen2-57b-a14b": (14_249_270_784, 13_160_193_536),
    "qwen3-30b-a3b": (3_353_032_704, 2_730_702_848),
    "qwen3-235b-a22b": (22_190_763_520, 20_946_103_808),
}

SAME_SHAPE = {f"qwen1.5-{size}": f"qwen-{size}" for size in ("1.8b", "7b", "14b", "72b")}
SAME_SHAPE |= {f"qwen2.5-{size}": f"qwen2-{size}" for size in ("0.5b", "1.5b", "7b", "72b")}
SAME_SHAPE |= {"qwen2.5-7b-1m": "qwen2-7b", "qwen2.5-14b-1m": "qwen2.5-14b"}


@pytest.mark.parametrize("name", config.names())
def test_counts_are_those_of_the_parameters_and_of_the_model_card(name):
    counts = config.get(name).param_counts()
    assert counts["total"] == sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract(config.get(name))))
    assert (counts["total"], counts["non_embedding"]) == PUBLISHED[SAME_SHAPE.get(name, name)]
    active = ACTIVE.get(name, (counts["total"], counts["non_embedding"]))
    assert (counts["active"], counts["active_non_embedding"]) == active


def test_what_differs_between_models_of_one_shape():
    field = lambda name, *names: tuple(getattr(config.get(name), field) for field in names)
    rope = ("rope_theta", "max_position_embeddings", "rms_norm_eps")
    assert field("qwen-14b", *rope) == (1e4, 8192, 1e-6)
    assert field("qwen-72b", *rope) == (1e6, 32_768, 1e-6)
    assert field("qwen1.5-14b", *rope) == (1e6, 32_768, 1e-6)
    assert field("qwen2.5-14b", *rope) == (1e6, 131_072, 1e-5)
    assert field("qwen2.5-14b-1m", *rope) == (1e7, 1_010_000, 1e-5)
    assert [config.get(f"qwen1.5-{size}").num_key_value_heads for size in ("14b", "32b")] == [40, 8]
    tied = [name for name in config.names() if config.get(name).tie_word_embeddings]
    assert tied == ["qwen1.5-0.5b"] + [f"qwen2-{s}" for s in ("0.5b", "1.5b")] + [
        f"qwen2.5-{s}" for s in ("0.5b", "1.5b", "3b")] + [f"qwen3-{s}" for s in ("0.6b", "1.7b", "4b")]  # fmt: skip


def test_how_the_published_models_read_further_than_they_were_trained():
    on = lambda field: {name: getattr(config.get(name), field) for name in config.names()
                        if getattr(config.get(name), field).on}  # fmt: skip
    tricks = {name: (x.seq_length, x.use_dynamic_ntk, x.use_logn_attn) for name, x in on("v1_lengths").items()}
    assert tricks == {f"qwen-{size}": (length, True, True) for size, length in (
        ("1.8b", 8192), ("7b", 8192), ("14b", 2048))}  # fmt: skip
    chunks = config.DualChunk(262_144, 8192, 262_144, "code")
    assert on("dual_chunk") == {"qwen2.5-7b-1m": chunks, "qwen2.5-14b-1m": chunks} and chunks.stride == 253_952
    assert not on("yarn")


def test_parts_come_back_from_json():
    model = config.get("qwen2-7b").replace(yarn=config.Yarn(4.0, 64))
    fields = json.loads(json.dumps(dataclasses.asdict(model)))
    assert config.QwenConfig().replace(**fields) == model
    with pytest.raises(InputError, match="Yarn has no field 'factors'; nearest: factor"):
        model.replace(yarn={"factors": 2.0})


@pytest.mark.parametrize("fields, message", [
    (dict(yarn=config.Yarn(2.0), dual_chunk=config.DualChunk(64, 16)), "yarn and dual_chunk on"),
    (dict(dual_chunk=config.DualChunk(64, 16), v1_lengths=config.V1Lengths(8, True)), "dual_chunk and v1_lengths on"),
    (dict(yarn=4.0), "yarn is 4.0; expected a Yarn"),
    (dict(dual_chunk={"chunk_size": 64, "local_size": 33}), "local_size is 33; expected 1 to 32"),
], ids=str)  # fmt: skip
def test_one_way_of_reading_further_at_a_time(fields, message):
    with pytest.raises(InputError, match=message):
        config.get("qwen2-7b").replace(**fields)


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


@pytest.mark.parametrize("value", [0, 0.0, -1e-6, math.nan, math.inf, "1e6", None, True])
@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "initializer_range"])
def test_a_scale_that_is_not_above_zero_is_refused_by_name(field, value):
    with pytest.raises(InputError) as caught:
        config.get("qwen2-0.5b").replace(**{field: value})
    assert str(caught.value) == f"QwenConfig.{field} is {value!r}; expected a finite number above 0"


@pytest.mark.parametrize("field, value, says", [
    ("num_experts_per_tok", 129, "num_experts_per_tok is 129, more than num_experts 128"),
    ("num_experts_per_tok", 0, "num_experts_per_tok is 0; expected a whole number of at least 1"),
    ("moe_intermediate_size", 0, "moe_intermediate_size is 0"), ("num_experts", -1, "num_experts is -1"),
    ("decoder_sparse_step", 0, "decoder_sparse_step is 0"), ("mlp_only_layers", (3, 48), r"mlp_only_layers has \[48\]"),
], ids=str)  # fmt: skip
def test_experts_that_cannot_be_are_refused_by_name(field, value, says):
    with pytest.raises(InputError, match=says):
        config.get("qwen3-30b-a3b").replace(**{field: value})
