"""The alignment tax: what preference optimisation gains in reward and loses in chat, with and without online merging.

    python -m experiments.ablations.alignment_tax cpu --workdir runs/tax --dpo.base runs/quickstart/sft \\
        --dpo.judge.reward runs/reward --pretrained runs/quickstart/pretrain

The same model is optimised three times on the rated tweets by DPO: with Adam alone, and with each step merged into what
fine-tuning had added to the pretrained model, by OnDARE and by OnTIES (arXiv:2405.17931; Qwen2 report, section 4.3).
At every checkpoint a reward model scores the policy's own answers to held-out prompts, and the base task is measured:
the loss on held-out chats, which the model was fine-tuned on and the preferences say nothing of.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import dpo, sft
from qwen_jax import models, sharding, tokenizer
from qwen_jax.data import loader
from qwen_jax.eval import policies
from qwen_jax.eval.policies import JudgeConfig
from qwen_jax.files import write_whole
from qwen_jax.training import bases, command, hosts, metrics, pretrained, report, samples, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.merging import MergingConfig
from qwen_jax.training.page import Block, Picture, Table, Text


@dataclass(frozen=True)
class Config:
    """What the runs have in common, and how the two of them merge."""

    dpo: dpo.Config
    chats: sft.Config  # whose held-out rows are the base task
    pretrained: str = ""  # the model before fine-tuning; "random": of dpo.base, too, what `chats` trains from nothing
    alpha: float = 2e-3  # a step's share of what fine-tuning had added: over 40 steps 8% of it
    reserve: float = 0.5


def cpu() -> Config:
    """40 steps each on the quickstart's models: two CPU cores, minutes."""
    small = dpo.small()
    run = dataclasses.replace(
        small,
        optimizer=dataclasses.replace(small.optimizer, peak_lr=5e-4),
        loop=LoopConfig(steps=40, log_every=10, eval_every=20, checkpoint_every=20),
        dataset="ratings-tweets-4", validation_dataset="ratings-tweets", validation_prompts=0,
        judge=JudgeConfig(prompts=1, each=128, every=20),
    )  # fmt: skip
    return Config(run, sft.small())


def smoke() -> Config:
    """Two steps each of random models: seconds, no network."""
    judge = JudgeConfig(reward="random", prompts=2, each=2, max_new_tokens=4, every=1)
    return Config(dataclasses.replace(dpo.smoke(), judge=judge), sft.smoke(), pretrained="random")


RECIPES = {"cpu": cpu, "smoke": smoke}


def run(config: Config, folder, recipe: str) -> dict[str, list[dict]]:
    """Trains what is not trained yet, and writes the report; returns the figures of each run, step by step."""
    folder = workdir.prepare(folder, config, experiment="ablations.alignment_tax", recipe=recipe, recipes=RECIPES)
    base, before = config.dpo.base, config.pretrained
    if before == "random":
        base = before = str(folder / "base")
        sft.run(config.chats, Path(base), recipe)
    shared = dataclasses.replace(config.dpo, base=base)
    found = {}
    for name, merging in cases(config, before).items():
        of_one = folder / merging.kind
        dpo.run(dataclasses.replace(shared, merging=merging), of_one, recipe)
        found[name] = figures(of_one, chat_losses(config.chats, base, of_one))
    hosts.once(lambda: write_whole(folder / "results.json", json.dumps(found, indent=1) + "\n"))
    hosts.once(lambda: plot(folder / "plots" / "tax.png", found))
    report.summarise(folder, title=f"alignment_tax {recipe}", blocks=summary(found))
    say("alignment_tax", f"done: {folder / 'report.md'}")
    return found


def cases(config: Config, before: str) -> dict[str, MergingConfig]:
    """Returns how each run merges."""
    how = dict(alpha=config.alpha, reserve=config.reserve, pretrained=before)
    dare, ties = MergingConfig("dare", rescale=True, **how), MergingConfig("ties", **how)
    return {"Adam alone": MergingConfig(), "OnDARE": dare, "OnTIES": ties}


def chat_losses(chats: sft.Config, base: str, folder: Path) -> dict[int, float]:
    """Returns the loss on held-out chats, nats per learned token: of the base (step 0) and of each checkpoint."""
    chats = bases.from_base(dataclasses.replace(chats, base=base), folder)
    built = sft.build(chats, sharding.make_mesh(chats.mesh))
    _, held_out = sft.rows(chats, tokenizer.load(pretrained.tokenizer_path(base)))
    kept = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    structs = models.placed(chats.model, built.layout)
    found = {}
    for step in (0, *kept):
        params = pretrained.load_params(folder if step else base, structs, step=step or None)
        total = weight = 0.0
        for rows in held_out.values():
            share = sharding.share(built.batch.tokens)
            for batch in loader.evaluation(rows, batch_size=chats.batch_size, **share):
                loss = jax.device_get(built.eval_step(params, sharding.put(batch, built.batch)))
                total, weight = total + float(loss.total), weight + float(loss.weight)
        found[step] = total / weight
    return found


def figures(folder: Path, chat: dict[int, float]) -> list[dict]:
    """Returns of each step that has a checkpoint what was gained and what it cost."""
    scores = {row["step"]: row for row in metrics.read(folder) if "validation/accuracy" in row}
    rows = []
    for step, kl, reward, error in policies.frontier(samples.read(folder)):
        if step in chat:
            held_out = {name: scores[step][f"validation/{name}"] for name in ("accuracy", "reward_margin")}
            rows.append(dict(step=step, kl=kl, reward=reward, error=error, chat_loss=chat[step], **held_out))
    return rows


def summary(found: dict[str, list[dict]]) -> list[Block]:
    """Returns what of the report tells gain and cost."""
    table = [
        [name, str(row["step"]), f"{row['reward']:.3f} ± {row['error']:.3f}", f"{row['kl']:.2f}",
         f"{row['accuracy']:.3f}", f"{row['reward_margin']:.3f}", f"{row['chat_loss']:.4f}",
         f"{row['chat_loss'] - rows[0]['chat_loss']:+.4f}"]
        for name, rows in found.items() for row in rows
    ]  # fmt: skip
    names = ["run", "step", "reward model's score", "KL, nats an answer", "held-out pairs ranked as people do"]
    return [
        Text(
            "The tax is the last column: what the loss on held-out chats, nats per learned token, has risen by. Scores "
            "are of answers sampled at temperature 1 for held-out prompts, ± the standard error of their mean."
        ),
        Table([*names, "implicit reward margin", "loss on chats", "tax"], table),
        Picture("plots/tax.png", "reward against the loss on chats"),
    ]


def plot(path: Path, found: dict[str, list[dict]]) -> None:
    """Draws the reward over the loss on chats, a line for each run, with the steps beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in found.items():
        losses, rewards, errors = ([row[key] for row in rows] for key in ("chat_loss", "reward", "error"))
        axes.errorbar(losses, rewards, yerr=errors, marker="o", capsize=3, label=name)
        for row in rows:
            axes.annotate(str(row["step"]), (row["chat_loss"], row["reward"]))
    axes.set(xlabel="loss on held-out chats, nats a token", ylabel="reward model's score")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
