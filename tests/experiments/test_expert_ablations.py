"""Upcycling's comparison and the study of specialisation: which runs they are made of, and what they report of them.

The runs themselves are those of `experiments.moe`; here they only leave figures that are known.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import moe, pretrain, upcycle
from experiments.ablations import expert_specialisation as specialisation
from qwen_jax import hf, models, tokenizer
from qwen_jax.training import throughput


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = pretrain.smoke().model
    hf.save(folder, model, models.init(model, jax.random.key(0)))
    tokenizer.train((f"{n} plus {m} is {n + m}." for n in range(60) for m in range(9)), 262).save(folder)
    return folder


@pytest.mark.parametrize("recipe", ["small", "small-copies"])
def test_the_three_runs_cost_the_same_and_differ_in_their_start(recipe, base):
    config = upcycle.RECIPES[recipe]()
    made = upcycle.runs(config, str(base))
    upcycled, dense, scratch = (made[name] for name in ("upcycled", "dense", "scratch"))
    assert scratch == dataclasses.replace(upcycled, base="random", tokenizer=str(base))
    assert upcycled.base == dense.base == str(base) and dense.model.num_experts == 0
    assert dense == dataclasses.replace(
        upcycled, model=dense.model, loop=dense.loop, optimizer=dense.optimizer
    )  # the same data, seed and batch
    per_step = lambda run: run.batch_size * run.length * throughput.train_flops_per_token(run.model, run.length)
    costs = {name: run.loop.steps * per_step(run) for name, run in made.items()}
    assert abs(costs["dense"] - costs["upcycled"]) <= per_step(dense) / 2
    share = lambda run: run.optimizer.decay_steps / run.loop.steps
    assert share(dense) == pytest.approx(share(upcycled), abs=1 / dense.loop.steps)


def test_the_report_of_upcycling_has_the_losses_of_its_runs(base, tmp_path, monkeypatch):
    started = []

    def pretended(run, folder, recipe):
        folder.mkdir(parents=True)
        loss = 5.0 - len(started)
        started.append(run)
        rows = [{"step": 0, "validation/loss": loss}, {"step": 2, "validation/loss": loss - 0.5}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": 1, "loss": 9.0}])))
        return {"made-up": moe.Tested(loss - 0.25, 10, None)}

    monkeypatch.setattr(moe, "run", pretended)
    config = dataclasses.replace(upcycle.smoke(), base=str(base))
    results = upcycle.run(config, tmp_path / "run", "smoke")
    assert started == list(upcycle.runs(config, str(base)).values())
    text = (tmp_path / "run" / "report.md").read_text()
    for first, (name, result) in zip((5.0, 4.0, 3.0), results.items(), strict=True):
        run = result.config
        cost = throughput.train_flops_per_token(run.model, run.length) * run.batch_size * run.length
        assert result.curve == [(0, first), (2 * cost, first - 0.5)] and result.test == first - 0.25
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f"| {2 * cost / 1e12:.3g} | {first:.4f} | {first - 0.5:.4f} | {first - 0.25:.4f} |")
    assert (tmp_path / "run" / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_models_that_are_compared_have_equal_size_and_work():
    shared = specialisation.cpu().moe
    made = {(g, b): specialisation.case(shared, g, b) for g in specialisation.GRAINS for b in specialisation.BALANCES}
    experts = lambda run: {name: run.model.param_counts()[name] for name in ("total", "active")}
    router = lambda run: run.model.num_hidden_layers * run.model.hidden_size * run.model.num_experts
    sizes = [{name: count - router(run) for name, count in experts(run).items()} for run in made.values()]
    assert all(size == sizes[0] for size in sizes)
    assert [run.model.num_experts for run in made.values()] == [8, 8, 32, 32]
    assert [run.router.kind for run in made.values()] == ["per-sequence", "global-batch"] * 2


def test_what_is_measured_of_a_split_by_domain_and_of_none():
    apart = {
        d: moe.Tested(1.0, 9, np.kron(np.eye(3)[[d, d]], np.full(4, 2.0))) for d in range(3)
    }  # 2 layers, 12 experts
    alike = {d: moe.Tested(1.0, 9, np.full((2, 12), 7.0 + d)) for d in range(3)}
    found = {name: values.mean() for name, values in specialisation.measures(apart).items()}
    assert found["information / log domains"] == pytest.approx(1) and found["overlap"] == 0
    assert found["specialists"] == 1 and found["entropy"] == pytest.approx(1)
    assert found["entropy in a domain"] == pytest.approx(math.log(4) / math.log(12))
    assert found["busiest over mean"] == pytest.approx(1)
    found = {name: values.mean() for name, values in specialisation.measures(alike).items()}
    assert found["information / log domains"] == pytest.approx(0, abs=1e-12)
    assert (found["overlap"], found["specialists"], found["entropy"]) == pytest.approx((1, 0, 1))


def test_specialisation_reports_every_run_and_the_untrained(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(1, 99, (6, 2, 2, 8)).astype(float)  # models, domains, layers, experts
    waiting = iter(counts)
    results = lambda: {f"domain {d}": moe.Tested(2.0 + d, 9, x) for d, x in enumerate(next(waiting))}
    monkeypatch.setattr(specialisation, "untrained", lambda config, tok: results())
    monkeypatch.setattr(moe, "run", lambda config, folder, recipe: results())
    smoke = specialisation.smoke()
    smoke = dataclasses.replace(smoke, moe=dataclasses.replace(smoke.moe, dataset="made-up:1"))
    found = specialisation.run(smoke, tmp_path / "run", "smoke")
    assert list(found) == ["coarse, untrained", "fine, untrained", "coarse, by row", "coarse, by batch", "fine, by row",
                           "fine, by batch"]  # fmt: skip
    text = (tmp_path / "run" / "report.md").read_text()
    for name, tested in found.items():
        values = specialisation.measures(tested)
        means = " | ".join(f"{each.mean():.3f}" for each in values.values())
        assert f"| {name} | 2.000 | 3.000 | {means} |" in text
        layers = " | ".join(f"{value:.3f}" for value in values["information / log domains"])
        assert f"| {name} | {layers} |" in text
    assert (tmp_path / "run" / "plots" / "load.png").read_bytes()[:4] == b"\x89PNG"
