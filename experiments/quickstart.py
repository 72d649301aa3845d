"""From nothing to a model that answers: tokenizer, pretraining, fine-tuning on ChatML, replies, a report.

    python -m experiments.quickstart cpu --workdir runs/quickstart

Real data (4,000 chats between people), two CPU cores, about five minutes and under 4 GB. In both stages the held-out
loss falls below that of a Kneser-Ney bigram model counted on the same tokens; the figures of your run stand in
report.md. A model of 0.9 million parameters does not know anything: its replies show that it learnt whose turn it is,
how people chat, and when to stop. Stopped, it goes on from its last checkpoint when it is started again.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import pretrain, sft
from qwen_jax import rollout, tokenizer
from qwen_jax.data import baseline
from qwen_jax.files import write_whole
from qwen_jax.training import checkpoint, command, metrics, report, workdir


@dataclass(frozen=True)
class Config:
    """Both stages, and what is asked of the model."""

    pretrain: pretrain.Config
    sft: sft.Config
    prompts: tuple[str, ...] = ("Hi, how are you?", "What do you do for fun?", "Do you have any pets?", "I like music.")
    max_new_tokens: int = 48
    temperature: float = 0.7
    top_p: float = 0.9


def cpu() -> Config:
    """The whole road on two CPU cores: about five minutes."""
    return Config(pretrain.small(), sft.small())


def ci() -> Config:
    """The whole road on the real data, cut to a sixth: about a minute."""
    full = cpu()
    short = lambda config, steps: dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, steps=steps, eval_every=steps // 2, checkpoint_every=steps // 2),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=10, schedule="constant"),
        validation_rows=32,
    )
    return dataclasses.replace(full, pretrain=short(full.pretrain, 60), sft=short(full.sft, 20))


def smoke() -> Config:
    """Two steps of each stage on made-up chats: seconds, no network."""
    return Config(pretrain.smoke(), sft.smoke(), prompts=("What is 3 plus 4?",), max_new_tokens=4)


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
        num_tokens=tok.vocab_size, temperature=config.temperature, top_p=config.top_p, stop_ids=tuple(
            tok.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>")
        ),
    )  # fmt: skip
    return [
        tok.decode(ids[:length].tolist(), skip_special=True).strip()
        for ids, length in zip(jax.device_get(answers.tokens), jax.device_get(answers.lengths), strict=True)
    ]


def run(config: Config, folder, recipe: str) -> None:
    """Runs what is not done yet, and writes the report."""
    folder = workdir.prepare(folder, config, experiment="quickstart", recipe=recipe)
    begin = time.perf_counter()
    stages = {"pretrain": folder / "pretrain", "sft": folder / "sft"}
    rows = {
        "pretrain": pretrain.run(config.pretrain, stages["pretrain"], recipe),
        "sft": sft.run(dataclasses.replace(config.sft, base=str(stages["pretrain"])), stages["sft"], recipe),
    }
    print("[quickstart] counting n-gram models on the same rows, and sampling replies", flush=True)
    vocab_size = config.pretrain.model.vocab_size
    baselines = {name: baseline.ngram_loss(*pair, vocab_size=vocab_size) for name, pair in rows.items()}
    before, after = replies(config, stages["pretrain"]), replies(config, stages["sft"])
    curves = {name: metrics.read(path) for name, path in stages.items()}
    report.plot_losses(folder / "plots" / "loss.png", curves, baselines)
    text = summary(config, curves, baselines, before, after, time.perf_counter() - begin)
    write_whole(folder / "report.md", text)
    print(text)
    print(f"[quickstart] done: {folder / 'report.md'}, curves in {folder / 'plots' / 'loss.png'}", flush=True)


def summary(config: Config, curves, baselines, before, after, seconds: float) -> str:
    """Returns report.md."""
    lines = [f"# Quickstart\n\nThis start took {seconds:.0f} s. All losses are nats per token on held-out chats.\n"]
    lines += ["| stage | first | last | unigram | bigram | beats the bigram |", "|---|---|---|---|---|---|"]
    for name, rows in curves.items():
        scores = [row["validation/loss"] for row in rows if "validation/loss" in row] or [float("nan")]
        unigram, bigram = baselines[name]["unigram"], baselines[name]["bigram"]
        verdict = "yes" if scores[-1] < bigram else "no"
        lines.append(f"| {name} | {scores[0]:.3f} | {scores[-1]:.3f} | {unigram:.3f} | {bigram:.3f} | {verdict} |")
    lines.append("\n![loss](plots/loss.png)\n")
    for name, rows in curves.items():
        lines += [f"{name}: {line}" for line in report.speed(rows)]
    lines += ["", "| asked | before fine-tuning | after |", "|---|---|---|"]
    cell = lambda text: text.replace("|", "\\|").replace("\n", "⏎")
    lines += [
        f"| {cell(prompt)} | {cell(old)} | {cell(new)} |"
        for prompt, old, new in zip(config.prompts, before, after, strict=True)
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
