"""Runs of GRPO and PPO: their first stage, a stop and going on to the bit, adapters, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import grpo, ppo, sft
from qwen_jax import sharding
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.rewards import RewardConfig
from qwen_jax.training import checkpoint, collecting, doctor, metrics, samples
from qwen_jax.training.collecting import SamplingConfig
from qwen_jax.training.lessons import UpdatesConfig

SMOKE = grpo.smoke()
SUMS = dataclasses.replace(
    SMOKE, base="sft", dataset="task", reward="",
    rewarded=RewardConfig(("answer", "tests.rewards.functions:length=0.1")),
    first=dataclasses.replace(sft.smoke(), length=128), shown=grpo.Shown((30, 4), chats=40, turns=2), most_prompts=8,
    loop=dataclasses.replace(SMOKE.loop, steps=3), updates=UpdatesConfig(minibatches=2, truncate=2.0),
    sampling=SamplingConfig(prompts=8, each=2, max_new_tokens=8, behind=True),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_device")


def test_grpo_from_its_first_stage_goes_on_after_a_stop_to_the_bit(tmp_path, monkeypatch):
    grpo.run(SUMS, tmp_path / "whole", "smoke")
    based = dataclasses.replace(SUMS, base=str(tmp_path / "whole.base" / "sft"))
    count = iter(range(99))

    def stopped(self, *, of=collecting.Collector.__next__):
        if next(count) == 3:  # the doctor's, two steps', and then
            raise KeyboardInterrupt
        return of(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collecting.Collector, "__next__", stopped)
        grpo.run(based, tmp_path / "cut", "smoke")
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "first_state", lambda *_: pytest.fail("it began anew"))
        grpo.run(based, tmp_path / "cut", "smoke")

    whole, cut = ([row for row in metrics.read(tmp_path / name) if "loss" in row] for name in ("whole", "cut"))
    timeless = lambda rows: [{k: v for k, v in row.items() if "second" not in k and "flops" not in k} for row in rows]
    assert timeless(cut) == timeless(whole) and [row["step"] for row in cut] == [1, 2, 3]
    assert all(row["policy/first_ratio_gap"] <= 1e-5 for row in whole)
    assert "reward/answer" in whole[0] and whole[0]["rollout/repetition"] >= 0
    params = [checkpoint.load_params(tmp_path / name)[1] for name in ("whole", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    report = (tmp_path / "cut" / "report.md").read_text()
    for title in ("## The policy's own answers", "## Rollouts and updates", "## What the doctor found"):
        assert title in report


def test_ppo_with_adapters_begins_as_its_reference(tmp_path):
    ppo.run(dataclasses.replace(ppo.smoke(), lora=LoraConfig(rank=2)), tmp_path / "run", "smoke")
    rows = [row for row in metrics.read(tmp_path / "run") if "loss" in row]
    assert rows[0]["rollout/kl"] == pytest.approx(0, abs=1e-4)
    assert [row["policy/updates"] for row in rows] == [1, 2]
    kept = samples.read(tmp_path / "run")
    assert list(kept) == [0, 2] and max(abs(sample["kl"]) for sample in kept[0]) < 1e-3
    assert all(
        finding.passed for finding in doctor.read(tmp_path / "run") if finding.name not in ("ends", "reward model")
    )
    assert len(doctor.read(tmp_path / "run")) == len(doctor.NAMES) - 1  # load_reward has seen to the vocabulary
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("module, recipe", [(m, r) for m in (grpo, ppo) for r in m.RECIPES if r != "smoke"])
def test_recipes_resolve_at_full_size_without_touching_a_device(module, recipe):
    config = module.RECIPES[recipe]()
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, context=2, tensor=2), jax.local_devices())
    built = module.build(config, mesh)
    rows, length = built.batch.rollout.tokens.shape
    assert (rows, length) == (config.sampling.rows, config.length)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(rewarded=RewardConfig(("answer",))), "reward is 'random', and rewarded.terms does not have 'model'"),
        (dict(updates=UpdatesConfig(minibatches=3)), "= 8 answers cannot be cut into updates.minibatches 3"),
        (dict(length=2048), "length is 2048, over model.max_position_embeddings 1024"),
        (dict(lora=LoraConfig(rank=2, dropout=0.1)), "the first ratio is to be 1"),
        (dict(updates=UpdatesConfig(value_only=2)), "the run has no more updates"),
        (dict(sampling=SamplingConfig(4, 2, 8, behind=True)), "expected importance weights"),
        (dict(sampling=SamplingConfig(4, 2, 8, temperature=0.7)), "and updates.truncate is 0"),
        (dict(sampling=SamplingConfig(4, 2, 120)), "does not fit into rows of 128"),
        (dict(validation_dataset="EMPTY"), "EMPTY"),
    ],
)
def test_what_cannot_be_is_one_line(changes, told, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    if "validation_dataset" in changes:
        changes, told = dict(validation_dataset=str(tmp_path / "empty.jsonl")), "no prompts"
    with pytest.raises(InputError, match=told) as error:
        grpo.run(dataclasses.replace(SMOKE, **changes), tmp_path / "run", "smoke")
    assert "\n" not in str(error.value)
