"""What the ablations of preference optimisation compare: the same steps from other beginnings, gain beside cost."""

import dataclasses
import json

import pytest

from experiments.ablations import alignment_tax, preference_pretraining
from qwen_jax.training import metrics, workdir

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_tax_is_what_the_loss_on_chats_has_risen_by(tmp_path, monkeypatch):
    whole = alignment_tax.cases
    monkeypatch.setattr(alignment_tax, "cases", lambda *given: {"OnTIES": whole(*given)["OnTIES"]})
    found = alignment_tax.run(alignment_tax.smoke(), tmp_path / "run", "smoke")
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    rows = found["OnTIES"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    tuned = [row["validation/loss"] for row in metrics.read(tmp_path / "run" / "base") if "validation/loss" in row]
    assert rows[0]["chat_loss"] == pytest.approx(tuned[-1], abs=1e-5)  # of the base: as fine-tuning left it
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3) and rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert rows[2]["reward_margin"] > rows[1]["reward_margin"] > 0
    assert rows[2]["chat_loss"] > rows[1]["chat_loss"] > rows[0]["chat_loss"]  # sums are not what the chats are about
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"{rows[2]['chat_loss'] - rows[0]['chat_loss']:+.4f}" in text
    assert (tmp_path / "run" / "plots" / "tax.png").stat().st_size > 5000


def test_every_way_of_merging_is_compared_with_none():
    found = alignment_tax.cases(alignment_tax.cpu(), "before")
    assert [merging.kind for merging in found.values()] == ["none", "dare", "ties"]
    assert {merging.pretrained for merging in found.values() if merging.kind != "none"} == {"before"}


def test_the_fine_tune_begins_with_the_pretraining_and_without_it(tmp_path, monkeypatch):
    """The runs are made up: each agrees by how it began."""
    begun = {}

    def run(config, folder, recipe):
        begun[folder.name] = config
        workdir.prepare(folder, config, experiment="reward_model", recipe=recipe)
        writer = metrics.MetricsWriter(folder, start=0)
        for step in (0, 1):
            share = 0.5 + 0.2 * (config.base != "tuned") + 0.1 * step
            writer.write(step, {"validation/accuracy": share, "validation/loss": 1 - share})
        writer.close()
        return dict(accuracy=share, error=0.01, nll=1 - share, pairs=100)

    monkeypatch.setattr(preference_pretraining.reward_model, "run", run)
    smoke = preference_pretraining.smoke()
    smoke = dataclasses.replace(smoke, tune=dataclasses.replace(smoke.tune, base="tuned"))
    found = preference_pretraining.run(smoke, tmp_path / "run", "smoke")
    assert [begun[name].base for name in ("pmp", "without", "with")] == [
        "tuned",
        "tuned",
        str(tmp_path / "run" / "pmp"),
    ]
    assert begun["with"] == dataclasses.replace(begun["without"], base=begun["with"].base)
    assert found["with"]["validation"][0]["accuracy"] == pytest.approx(0.7)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| without | 0.600 ± 0.010 | 0.400 | 100 |" in text and "| 1 | 0.600 | 0.800 | 0.400 | 0.200 |" in text
