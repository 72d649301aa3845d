"""Reward models and DPO on packed batches are what they are answer by answer; runs, their reports and refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import best_of_n, dpo, online_dpo, reward_model
from qwen_jax import hf, models, sharding
from qwen_jax.batches import PreferenceBatch
from qwen_jax.config import LoraConfig
from qwen_jax.data import formats
from qwen_jax.data.conversations import Document
from qwen_jax.data.preferences import Answers, PreferenceRows
from qwen_jax.errors import InputError
from qwen_jax.eval import policies
from qwen_jax.eval import preferences as judged
from qwen_jax.sharding import Layout
from qwen_jax.training import checkpoint, metrics, samples
from qwen_jax.training.merging import MergingConfig
from tests.conftest import tiny

ONE = Layout(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
MODEL = tiny(num_hidden_layers=1)
SCORER = MODEL.replace(head="score")

pytestmark = pytest.mark.usefixtures("one_device")


class Documents(list):
    lengths = property(lambda self: np.array([len(document.ids) for document in self]))


def made(seed=0):
    """Answers to five prompts, two to four each, and their rows as a batch."""
    draw = np.random.default_rng(seed)
    sizes = [2, 4, 2, 3, 2]
    documents = Documents()
    for _ in range(sum(sizes)):
        asked, answered = draw.integers(2, 6, 2)
        ids = draw.integers(1, 256, asked + answered).astype(np.int32)
        documents.append(Document(ids, np.arange(len(ids)) >= asked))
    groups = np.repeat(np.arange(5), sizes)
    values = np.concatenate([draw.permutation(size) for size in sizes]).astype(np.float32)
    rows = PreferenceRows(Answers(documents, values, groups, ["a"] * 5), 40, 8)
    rows.reference = draw.normal(-20, 3, len(values)).astype(np.float32)
    assert 1 < len(rows) < 5
    return rows, PreferenceBatch(
        *(jnp.stack(arrays) for arrays in zip(*map(rows.__getitem__, range(len(rows))), strict=True))
    )


def compared(rows, least=0.0):
    """Every comparison, by a plain loop: (better, worse)."""
    values, groups = rows.answers.values, rows.answers.groups
    every = range(len(values))
    return [
        (i, j) for i in every for j in every if groups[i] == groups[j] and values[i] - values[j] > max(least - 1e-6, 0)
    ]


def test_the_ranking_loss_of_a_packed_batch_is_that_of_its_answers_one_by_one():
    rows, batch = made()
    params = models.init(SCORER, jax.random.key(0))
    alone = [float(models.scores(SCORER, params, ids[None])[0, -1]) for ids, _ in rows.answers.documents]
    for ranking in (reward_model.RankingLoss(), reward_model.RankingLoss(margin=0.5, centring=0.1, least=2.0)):
        found = reward_model.ranking_loss(params, batch, None, model=SCORER, layout=Layout(), ranking=ranking)
        pairs = compared(rows, ranking.least)
        values = rows.answers.values
        expected = [
            np.log1p(np.exp(alone[j] - alone[i] + ranking.margin * (values[i] - values[j])))
            + ranking.centring * (alone[i] + alone[j]) ** 2
            for i, j in pairs
        ]
        assert found.weight == len(pairs) > 3
        np.testing.assert_allclose(found.total, sum(expected), rtol=1e-4)
        np.testing.assert_allclose(found.metrics["accuracy"], sum(alone[i] > alone[j] for i, j in pairs))


@pytest.mark.parametrize("variant", ["sigmoid", "simpo"])
def test_the_dpo_loss_of_a_packed_batch_is_that_of_its_answers_one_by_one(variant):
    rows, batch = made()
    params = models.init(MODEL, jax.random.key(0))

    def log_prob(ids, mask):
        return float(models.sequence_log_probs(MODEL, params, ids[None])[0][mask[1:]].sum())

    policy = np.array([log_prob(*document) for document in rows.answers.documents])
    lengths = np.array([document.loss_mask.sum() for document in rows.answers.documents])
    how = dpo.PreferenceLoss(variant=variant, beta=0.3)
    found = dpo.preference_loss(params, batch, None, model=MODEL, layout=Layout(), how=how, reference="cached")
    h = policy - rows.reference if variant == "sigmoid" else policy / lengths
    gamma = 0.0 if variant == "sigmoid" else how.gamma
    expected = [np.log1p(np.exp(gamma - 0.3 * (h[i] - h[j]))) for i, j in compared(rows)]
    np.testing.assert_allclose(found.total, sum(expected), rtol=1e-4)
    assert found.weight == len(expected)


def test_switching_the_adapters_off_is_the_cached_reference():
    _, batch = made()
    lora = LoraConfig(rank=2, targets=("v", "o"))
    params = models.init(MODEL, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.3, models.lora.init(MODEL, lora, jax.random.key(1), params))
    kept = models.answers.log_probs(MODEL, params, batch, layout=Layout())
    loss = functools.partial(
        dpo.preference_loss, adapters, key=None, model=MODEL, layout=Layout(), how=dpo.PreferenceLoss(),
        frozen=(params,), lora=lora,
    )  # fmt: skip
    off, cached = loss(batch, reference="lora-off"), loss(batch._replace(reference=kept), reference="cached")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), off, cached)
    assert abs(off.total / off.weight - np.log(2)) > 1e-4  # the adapters do something


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A reward model's smoke run."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    return folder, reward_model.run(reward_model.smoke(), folder, "smoke")


def test_a_reward_run_says_how_it_agrees_and_transformers_may_have_it(scored, tmp_path):
    folder, figures = scored
    assert figures == json.loads((folder / "comparisons.json").read_text()) and figures["pairs"] == 40
    last = [row for row in metrics.read(folder) if "validation/accuracy" in row][-1]
    assert figures["accuracy"] == pytest.approx(last["validation/accuracy"])
    assert figures["nll"] == pytest.approx(last["validation/nll"], abs=1e-5)
    report = (folder / "report.md").read_text()
    assert "## Agreement with people" in report and "nats per comparison" in report
    assert (folder / "plots" / "comparisons.png").stat().st_size > 5000
    hf.save(tmp_path / "hf", *checkpoint.load_params(folder))
    assert hf.read_config(tmp_path / "hf").head == "score"


def test_adapters_begin_with_the_head_of_a_reward_model_and_are_read_with_their_base(scored, tmp_path):
    folder, _ = scored
    lora = dataclasses.replace(reward_model.smoke(), base=str(folder), lora=LoraConfig(rank=2))
    reward_model.run(lora, tmp_path / "run", "smoke")
    before, after = (
        [row["validation/loss"] for row in metrics.read(f) if "validation/loss" in row]
        for f in (folder, tmp_path / "run")
    )
    assert after[0] == pytest.approx(before[-1], abs=1e-5) and after[-1] < after[0]
    model = checkpoint.load_params(tmp_path / "run")[0]
    whole = reward_model.base_params(
        dataclasses.replace(lora, base=str(tmp_path / "run"), model=model), ONE, jax.random.key(0)
    )
    assert whole["score"].shape == (1, model.hidden_size) and "head" not in whole


def test_dpo_is_judged_by_a_reward_model_and_goes_on_with_the_reference_it_kept(scored, tmp_path, capsys):
    judge = dpo.JudgeConfig(reward=str(scored[0]), prompts=2, each=4, max_new_tokens=8)
    merged = MergingConfig("dare", alpha=1e-3, reserve=0.5, pretrained=str(scored[0]))  # a model of the same shape
    smoke = dataclasses.replace(dpo.smoke(), judge=judge, merging=merged)
    dpo.run(smoke, tmp_path / "run", "smoke")
    scores = [row for row in metrics.read(tmp_path / "run") if "validation/loss" in row]
    assert scores[0]["validation/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert scores[-1]["validation/reward_margin"] > scores[0]["validation/reward_margin"] == pytest.approx(0, abs=1e-4)
    kept = samples.read(tmp_path / "run")
    assert list(kept) == [0, 2] and len(kept[0]) == 8
    assert max(abs(sample["kl"]) for sample in kept[0]) < 1e-3 < max(abs(sample["kl"]) for sample in kept[2])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Held-out pairs" in report and "KL from the reference" in report
    capsys.readouterr()
    dpo.run(smoke, tmp_path / "run", "smoke")
    told = capsys.readouterr().out
    assert "already at step 2 of 2" in told and "computing the reference" not in told


def test_what_cannot_be_is_one_line(tmp_path):
    smoke = dpo.smoke()
    with pytest.raises(InputError, match='reference is "lora-off" and lora.rank is 0'):
        dpo.run(dataclasses.replace(smoke, reference="lora-off"), tmp_path / "a", "smoke")
    with pytest.raises(InputError, match="limit is 2048, over model.max_position_embeddings 1024"):
        reward_model.run(dataclasses.replace(reward_model.smoke(), limit=2048), tmp_path / "b", "smoke")


def test_a_judge_without_a_score_head_is_one_line(tmp_path):
    base = tmp_path / "base"
    params = models.init(MODEL.replace(vocab_size=272), jax.random.key(0))
    hf.save(base, MODEL.replace(vocab_size=272), params)
    smoke = dataclasses.replace(dpo.smoke(), judge=dpo.JudgeConfig(reward=str(base)))
    with pytest.raises(InputError, match="base has no score head: expected a reward model") as error:
        dpo.run(smoke, tmp_path / "run", "smoke")
    assert "\n" not in str(error.value)


def test_best_of_n_keeps_the_best_that_ended_and_writes_what_sft_reads(scored, tmp_path, monkeypatch):
    def ended(self, params, key, *, each, max_new_tokens):
        """Every prompt's answers, of which the likeliest by far did not end."""
        told = lambda n: dict(reward=float(n), answer=f"answer {n}", finished=n < each - 1)
        return [told(n) for _ in self.prompts for n in range(each)]

    monkeypatch.setattr(policies.Judge, "samples", ended)
    figures = best_of_n.run(best_of_n.smoke(), tmp_path / "run", "smoke")
    assert figures[-1]["n"] == 4 and figures[-1]["reward"] == 3 and figures[0]["reward"] == 1.5
    lines = [json.loads(line) for line in (tmp_path / "run" / "best.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["messages"][-1]["content"] for line in lines} == {"answer 2"}
    assert len({line["messages"][0]["content"] for line in lines}) == 4
    assert formats.conversation(lines[0], formats.detect(lines[0])).messages == lines[0]["messages"]
    assert "KL, at most" in (tmp_path / "run" / "report.md").read_text()
    assert len(samples.read(tmp_path / "run")[0]) == 4 * 4


def test_best_of_n_of_random_models_reaches_its_report(tmp_path):
    figures = best_of_n.run(best_of_n.smoke(), tmp_path / "run", "smoke")
    assert figures[-1]["reward"] > figures[0]["reward"] and (tmp_path / "run" / "best.jsonl").exists()
    with pytest.raises(InputError, match="no reward model was given"):
        best_of_n.run(dataclasses.replace(best_of_n.smoke(), reward=""), tmp_path / "other", "smoke")


def test_online_dpo_learns_from_its_own_best_and_worst_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    smoke = online_dpo.smoke()
    online_dpo.run(smoke, tmp_path / "whole", "smoke")
    whole = metrics.read(tmp_path / "whole")
    assert [row["loss"] for row in whole if "loss" in row][0] == pytest.approx(np.log(2), abs=1e-5)
    kept = online_dpo.dpo.first_state

    def stopped(self, *, of=online_dpo.Sampled.__next__):
        if self._index == 1:
            raise KeyboardInterrupt
        return of(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(online_dpo.Sampled, "__next__", stopped)
        online_dpo.run(smoke, tmp_path / "cut", "smoke")
    monkeypatch.setattr(online_dpo.dpo, "first_state", lambda *_: pytest.fail("it began anew"))
    online_dpo.run(smoke, tmp_path / "cut", "smoke")
    monkeypatch.setattr(online_dpo.dpo, "first_state", kept)
    cut = metrics.read(tmp_path / "cut")
    assert [row["loss"] for row in cut if "loss" in row] == [row["loss"] for row in whole if "loss" in row]


def test_the_best_and_the_worst_of_each_prompt_are_compared():
    told = lambda reward, *ids: dict(reward=float(reward), ids=list(ids))
    found = [told(1, 5), told(3, 6, 7), told(2, 8), told(0, 9), told(0, 9), told(0, 9)]
    answers = online_dpo.best_and_worst([[1, 2], [3]], found, 3)
    assert [document.ids.tolist() for document in answers.documents] == [[1, 2, 6, 7], [1, 2, 5], [3, 9], [3, 9]]
    assert answers.documents[0].loss_mask.tolist() == [False, False, True, True]
    assert answers.values.tolist() == [3, 1, 0, 0] and answers.groups.tolist() == [0, 0, 1, 1]
    assert len(judged.pairs(answers)) == 1  # equal scores are no comparison


def test_rows_too_short_for_what_may_be_sampled_are_one_line(tmp_path):
    with pytest.raises(InputError, match="length is 256, and the longest prompt with two answers may have"):
        online_dpo.run(dataclasses.replace(online_dpo.smoke(), max_new_tokens=200), tmp_path / "run", "smoke")
