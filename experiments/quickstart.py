"""From nothing to a model shaped by people's taste: tokenizer, pretraining, fine-tuning, reward model, PPO, report.

    python -m experiments.quickstart cpu --workdir runs/quickstart

Real data (4,000 chats between people), two CPU cores, about eight minutes and under 4 GB. In the first two stages the
held-out loss falls below that of a Kneser-Ney bigram model counted on the same tokens; the third learns from human
ratings which of two tweets is the more positive one; in the last, PPO makes the model's own tweets score higher. The
figures of your run stand in report.md. A model of 0.9 million
parameters does not know anything: its replies show that it learnt whose turn it is, how people chat, and when to stop.
Stopped, it goes on from its last checkpoint when it is started again.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import ppo, pretrain, reward_model, sft
from qwen_jax import rollout, tokenizer
from qwen_jax.data import baseline
from qwen_jax.eval import reinforced
from qwen_jax.training import checkpoint, command, metrics, page, report, workdir
from qwen_jax.training.doctor import DoctorConfig
from qwen_jax.training.page import Picture, Table, Text


@dataclass(frozen=True)
class Config:
    """All stages, and what is asked of the model."""

    pretrain: pretrain.Config
    sft: sft.Config
    reward: reward_model.Config
    ppo: ppo.Config
    prompts: tuple[str, ...] = ("Hi, how are you?", "What do you do for fun?", "Do you have any pets?", "I like music.")
    max_new_tokens: int = 48
    temperature: float = 0.7
    top_p: float = 0.9


def cpu() -> Config:
    """The whole road on two CPU cores: about eight minutes."""
    return Config(pretrain.small(), sft.small(), reward_model.tweets(), ppo.quickstart())


def ci() -> Config:
    """The whole road on the real data, cut to a sixth: about a minute."""
    full = cpu()
    short = lambda config, steps: dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, steps=steps, eval_every=steps // 2, checkpoint_every=steps // 2),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=10, schedule="constant"),
        validation_rows=32,
    )
    reward = dataclasses.replace(
        full.reward,
        loop=dataclasses.replace(full.reward.loop, steps=8, eval_every=8, checkpoint_every=8),
        optimizer=dataclasses.replace(full.reward.optimizer, warmup_steps=4),
        validation_prompts=40,
        test_prompts=40,
    )
    learned = dataclasses.replace(
        full.ppo,
        loop=dataclasses.replace(full.ppo.loop, steps=4, eval_every=4, checkpoint_every=4),
        judge=dataclasses.replace(full.ppo.judge, prompts=8, every=0),
        doctor=DoctorConfig(
            tolerated=("ends", "values", "reward model")
        ),  # of models that have learned next to nothing
    )
    stages = dict(pretrain=short(full.pretrain, 60), sft=short(full.sft, 20), reward=reward, ppo=learned)
    return dataclasses.replace(full, **stages)


def smoke() -> Config:
    """Two steps of each stage on made-up chats: seconds, no network."""
    return Config(
        pretrain.smoke(), sft.smoke(), reward_model.smoke(), ppo.smoke(), ("What is 3 plus 4?",), max_new_tokens=4
    )


RECIPES = {"cpu": cpu, "ci": ci, "smoke": smoke}


def replies(config: Config, folder: Path) -> list[str]:
    """Returns what the newest model in this run's folder answers to each prompt."""
    model, params = checkpoint.load_params(folder)
    tok = tokenizer.load(folder / "tokenizer")
    asked = [
        tokenizer.chat.render(
            [{"role": "user", "content": prompt}], tok, generation=config.sft.template, add_generation_prompt=True
        )[0]
        for prompt in config.prompts
    ]
    answers = rollout.generate(
        model, params, asked, jax.random.key(config.sft.seed), max_new_tokens=config.max_new_tokens,
        num_tokens=tok.vocab_size, temperature=config.temperature, top_p=config.top_p,
        stop_ids=tokenizer.chat.stop_ids(tok),
    )  # fmt: skip
    return [
        tok.decode(ids[:length].tolist(), skip_special=True).strip()
        for ids, length in zip(jax.device_get(answers.tokens), jax.device_get(answers.lengths), strict=True)
    ]


def run(config: Config, folder, recipe: str) -> None:
    """Runs what is not done yet, and writes the report."""
    folder = workdir.prepare(folder, config, experiment="quickstart", recipe=recipe, recipes=RECIPES)
    begin = time.perf_counter()
    stages = {"pretrain": folder / "pretrain", "sft": folder / "sft"}
    rows = {
        "pretrain": pretrain.run(config.pretrain, stages["pretrain"], recipe),
        "sft": sft.run(dataclasses.replace(config.sft, base=str(stages["pretrain"])), stages["sft"], recipe),
    }
    reward = dataclasses.replace(config.reward, base=str(stages["sft"]))
    agreement = reward_model.run(reward, folder / "reward", recipe)
    learned = dataclasses.replace(config.ppo, base=str(stages["sft"]), reward=str(folder / "reward"))
    ppo.run(learned, folder / "ppo", recipe)
    print("[quickstart] counting n-gram models on the same rows, and sampling replies", flush=True)
    vocab_size = config.pretrain.model.vocab_size
    baselines = {name: baseline.ngram_loss(*pair, vocab_size=vocab_size) for name, pair in rows.items()}
    answers = [replies(config, stage) for stage in stages.values()]
    curves = {name: metrics.read(path) for name, path in stages.items()}
    report.plot_losses(folder / "plots" / "loss.png", curves, baselines)
    blocks = [
        Text(f"This start took {time.perf_counter() - begin:.0f} s."),
        *losses(curves, baselines),
        Text("Reward model", 2),
        Text(told(agreement, reward.dataset)),
        Text("PPO", 2),
        *reinforced.before_and_after(folder / "ppo"),
        Text("Replies", 2),
        Table(["asked", "before fine-tuning", "after"], [*zip(config.prompts, *answers, strict=True)]),
    ]
    report.summarise(folder, title=f"quickstart {recipe}", blocks=blocks)
    print(f"[quickstart] done: {folder / 'report.md'}, curves in {folder / 'plots' / 'loss.png'}", flush=True)


def told(agreement: dict, dataset: str) -> str:
    """Returns what of the report is about the reward model."""
    return (
        f"Of {agreement['pairs']:,} held-out pairs ({dataset}) it ranks {agreement['accuracy']:.1%} ± "
        f"{agreement['error']:.1%} as people do; 50% is knowing nothing. It has a whole report.md in reward/."
    )


def losses(curves: dict[str, list[dict]], baselines: dict[str, dict[str, float]]) -> list[page.Block]:
    """Returns what of the report is about losses and speed."""
    table = []
    for name, rows in curves.items():
        scores = [row["validation/loss"] for row in rows if "validation/loss" in row] or [float("nan")]
        figures = scores[0], scores[-1], baselines[name]["unigram"], baselines[name]["bigram"]
        verdict = "yes" if scores[-1] < baselines[name]["bigram"] else "no"
        table.append([name, *(f"{figure:.3f}" for figure in figures), verdict])
    return [
        Text("Losses", 2),
        Text("Nats per token on held-out chats; each stage has a whole report.md in its own folder."),
        Table(["stage", "first", "last", "unigram", "bigram", "beats the bigram"], table),
        Picture("plots/loss.png", "loss"),
        *(Text(f"{name}: {report.median_step(rows)}") for name, rows in curves.items()),
    ]


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
