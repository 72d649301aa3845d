"""Preference model pretraining: the same few steps on one domain's comparisons, with others learned before and without.

    python -m experiments.ablations.preference_pretraining cpu --workdir runs/pmp --tune.base runs/quickstart/sft

A reward model that is to rank tweets begins as the SFT model, or as one that has learned from ratings of films,
products and news before (Qwen report, arXiv:2309.16609, section 3.2.1; Askell et al., arXiv:2112.00861, section 4).
Both take the same steps on the same batches of tweets; what counts is the agreement on held-out ones after each.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from experiments import reward_model
from qwen_jax.files import write_whole
from qwen_jax.training import command, hosts, metrics, report, workdir
from qwen_jax.training.loop import say
from qwen_jax.training.page import Block, Picture, Table, Text


@dataclass(frozen=True)
class Config:
    """The pretraining, and the fine-tune with and without it."""

    pmp: reward_model.Config  # its base is that of `tune`
    tune: reward_model.Config


def cpu() -> Config:
    """100 steps on three domains, then 40 on tweets, twice: two CPU cores, minutes."""
    tweets = reward_model.tweets()
    loop = dataclasses.replace(tweets.loop, steps=40, eval_every=10, checkpoint_every=40)
    return Config(
        reward_model.small_pmp(), dataclasses.replace(tweets, loop=loop, validation_dataset="ratings-tweets-4")
    )


def smoke() -> Config:
    """Two steps each on made-up pairs: seconds, no network."""
    return Config(reward_model.smoke(), reward_model.smoke())


RECIPES = {"cpu": cpu, "smoke": smoke}


def run(config: Config, folder, recipe: str) -> dict[str, dict]:
    """Trains what is not trained yet, and writes the report; returns what was found with and without."""
    folder = workdir.prepare(
        folder, config, experiment="ablations.preference_pretraining", recipe=recipe, recipes=RECIPES
    )
    before = folder / "pmp"
    reward_model.run(dataclasses.replace(config.pmp, base=config.tune.base), before, recipe)
    found = {}
    for name, base in (("without", config.tune.base), ("with", str(before))):
        tested = reward_model.run(dataclasses.replace(config.tune, base=base), folder / name, recipe)
        curve = [row for row in metrics.read(folder / name) if "validation/accuracy" in row]
        held_out = {row["step"]: {key: row[f"validation/{key}"] for key in ("accuracy", "loss")} for row in curve}
        found[name] = {"test": tested, "validation": held_out}
    hosts.once(lambda: write_whole(folder / "results.json", json.dumps(found, indent=1) + "\n"))
    hosts.once(lambda: plot(folder / "plots" / "pmp.png", found))
    report.summarise(folder, title=f"preference_pretraining {recipe}", blocks=summary(config, found))
    say("preference_pretraining", f"done: {folder / 'report.md'}")
    return found


def summary(config: Config, found: dict[str, dict]) -> list[Block]:
    """Returns what of the report compares the two."""
    share = lambda test: f"{test['accuracy']:.3f} ± {test['error']:.3f}"
    steps = [
        [str(step), *(f"{found[name]['validation'][step][key]:.3f}" for key in ("accuracy", "loss") for name in found)]
        for step in found["with"]["validation"]
    ]
    tests = [[name, share(one["test"]), f"{one['test']['nll']:.3f}", str(one["test"]["pairs"])]
             for name, one in found.items()]  # fmt: skip
    header = ["step", *(f"{key}, {name}" for key in ("accuracy", "loss") for name in found)]
    return [
        Text(f"Pretrained for {config.pmp.loop.steps} steps on {config.pmp.dataset}, then fine-tuned on "
             f"{config.tune.dataset}. Accuracy is the share of comparisons ranked as people do; losses are nats."),
        Text("Test split, after the last step", 2),
        Table(["pretraining", "accuracy", "loss", "comparisons"], tests),
        Text("Validation split, at equal steps of the fine-tune", 2),
        Table(header, steps),
        Picture("plots/pmp.png", "agreement on held-out comparisons with and without pretraining"),
    ]  # fmt: skip


def plot(path: Path, found: dict[str, dict]) -> None:
    """Draws the accuracy on held-out comparisons over the steps of the fine-tune."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, one in found.items():
        steps, accuracy = zip(*((step, row["accuracy"]) for step, row in one["validation"].items()), strict=True)
        axes.plot(steps, accuracy, marker="o", label=f"{name} pretraining")
    axes.set(xlabel="steps of the fine-tune", ylabel="share of held-out comparisons ranked as people do")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
