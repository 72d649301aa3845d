"""Reward models as folders of transformers' sequence classification: in, out, and what is refused."""

import json

import jax
import numpy as np
import pytest

from qwen_jax import hf
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from tests.conftest import FAMILIES
from tests.hf import made_up

LABELS = dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})


def folder(path, family, **changes):
    """A classifier with one label, by hand-written names: no lm_head, a score."""
    kind = "Qwen3" if family.qk_norm else "Qwen2"
    fields = made_up.fields(family, **{"architectures": [f"{kind}ForSequenceClassification"], **LABELS, **changes})
    tensors = made_up.tensors(family, np.float32)
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = np.random.default_rng(9).normal(0, 1, (1, family.hidden_size)).astype(np.float32)
    return made_up.write(path, fields, tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_trip_keeps_every_byte(name, tmp_path):
    src = folder(tmp_path / "in", FAMILIES[name])
    config, params = hf.load(src)
    assert config.head == "score" and "head" not in params
    np.testing.assert_array_equal(params["score"], made_up.held(src)["score.weight"])
    hf.save(tmp_path / "out", config, params, pad_token_id=5)
    before, after = made_up.held(src), made_up.held(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == json.loads((src / "config.json").read_text())["architectures"]
    assert written["id2label"] == LABELS["id2label"] and written["pad_token_id"] == 5
    assert hf.read_config(tmp_path / "out") == config.replace(param_dtype="float32")


def test_a_folder_without_the_score_head_is_one_line(tmp_path):
    src = folder(tmp_path / "in", FAMILIES["qwen3"])
    tensors = made_up.held(src)
    made_up.write(
        src, json.loads((src / "config.json").read_text()), {k: v for k, v in tensors.items() if k != "score.weight"}
    )
    with pytest.raises(InputError, match="missing: score.weight") as error:
        hf.load(src)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, found", [(dict(id2label={"0": "bad", "1": "good"}), 2), (dict(id2label=None), 2), (dict(num_labels=3), 3)]
)
def test_a_classifier_with_several_labels_is_refused(changes, found, tmp_path):
    with pytest.raises(InputError, match=f"ForSequenceClassification has {found} labels; only a reward model"):
        hf.load(folder(tmp_path / "in", FAMILIES["qwen3"], **changes))


def test_an_adapter_keeps_the_head_that_was_trained_with_it(tmp_path):
    config, params = hf.load(folder(tmp_path / "in", FAMILIES["qwen2-tied"]))
    lora = LoraConfig(rank=2, targets=("q",))
    from qwen_jax import models

    tree = jax.tree.map(lambda x: x + 0.5, models.lora.init(config, lora, jax.random.key(0), params))
    hf.save_adapter(tmp_path / "adapter", config, hf.Adapter(lora, tree))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    jax.tree.map(np.testing.assert_array_equal, hf.load_adapter(tmp_path / "adapter", config).tree, tree)
