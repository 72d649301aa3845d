"""Byte-level BPE against SentencePiece unigram (Kudo, arXiv:1804.10959): equal vocabulary, text, model and compute.

    python -m experiments.ablations.tokenizers cpu --workdir runs/tokenizers

Source: 4,000 human chats (data.chitchat), each tokenizer trained on the training split, each model scored on the whole
validation split: 595,693 bytes. Equal compute, so equal steps of equally many tokens; the bytes they spell differ and
are reported. Two CPU cores: 5.4 minutes, half a minute of them SentencePiece's training.

Expected with 1,024 tokens: 2.836 bytes per token of byte-level BPE, 2.758 of unigram; bits per byte 2.0646 and 2.0574
with seed 0, 2.0511 and 2.0576 with seed 1. A seed changes more than the tokenizer does: no winner at this size
(docs/results/tokenizer_comparison).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments import pretrain
from qwen_jax import tokenizer
from qwen_jax.batches import LMBatch
from qwen_jax.data import conversations, sources
from qwen_jax.files import write_whole
from qwen_jax.training import command, metrics, pretrained, workdir

# Another tokenizer is a line here: (texts, vocab_size) -> Tokenizer.
TRAINERS = {"byte-bpe": tokenizer.train, "unigram": tokenizer.train_sentencepiece}
EVERY_ROW = 10**9  # tokens differ in length, so that an equal number of rows would not be the same text


@dataclass(frozen=True)
class Config:
    """One training run per tokenizer; `tokenizer` and `validation_rows` of it are set here."""

    pretrain: pretrain.Config


def cpu() -> Config:
    """1,024 tokens and 1M parameters each on human chats: two CPU cores, 5.4 minutes."""
    base = pretrain.small()
    return Config(
        dataclasses.replace(
            base,
            loop=dataclasses.replace(base.loop, steps=400, eval_every=100, checkpoint_every=200),
            optimizer=dataclasses.replace(base.optimizer, decay_steps=160),
        )
    )


def smoke() -> Config:
    """Two steps each on made-up chats, whose few words do not fill even 288 tokens: seconds, no network."""
    base = pretrain.smoke()
    return Config(dataclasses.replace(base, model=base.model.replace(vocab_size=288)))


RECIPES = {"cpu": cpu, "smoke": smoke}


class Text(NamedTuple):
    """What rows hold. The first token of a text has nothing to be predicted from, so it is no target."""

    size: int  # UTF-8 bytes
    tokens: int
    targets: int  # as many as the tokens that spell text: all but one <|endoftext|> for each first token


class Result(NamedTuple):
    """What became of one tokenizer."""

    vocab_size: int
    held_out: Text
    nats_per_token: float
    curve: list[tuple[float, float]]  # bytes trained on, bits per byte of the held-out text


def measure(rows: Sequence[LMBatch], tok: tokenizer.Tokenizer) -> Text:
    """Counts the text of rows."""
    ids = [row.tokens[row.segment_ids > 0] for row in rows]
    size = sum(len(tok.decode_bytes(some, skip_special=True)) for some in ids)
    return Text(size, sum(map(len, ids)), int(sum(row.loss_mask.sum() for row in rows)))


def bits_per_byte(nats_per_target: float, text: Text, vocab_size: int) -> float:
    """Returns the length of the whole text, ends included, in the model's code, over its bytes.

    First tokens are coded too, each as one of vocab_size equally likely ones: left out, they would be more text for
    the tokenizer with the longer tokens.
    """
    nats = nats_per_target * text.targets + (text.tokens - text.targets) * math.log(vocab_size)
    return nats / math.log(2) / text.size


def train_one(config: pretrain.Config, folder: Path, name: str, recipe: str) -> Result:
    """Trains a tokenizer and a model on its tokens, or what of it is not done yet."""

    def make():
        print(f"[tokenizers] training {name} on the texts of {config.dataset}", flush=True)
        texts = map(conversations.plain_text, sources.load(config.dataset, "train"))
        return TRAINERS[name](texts, config.model.vocab_size)

    kept = folder / "tokenizers" / name
    tok = pretrained.keep_tokenizer(kept, make, at_most=config.model.vocab_size)
    config = dataclasses.replace(config, tokenizer=str(kept), validation_rows=EVERY_ROW)
    train, validation = pretrain.run(config, folder / name, recipe)
    held_out, scores = measure(validation, tok), [r for r in metrics.read(folder / name) if "validation/loss" in r]
    bytes_per_step = config.batch_size * config.length * measure(train, tok).size / train.tokens
    bits = [bits_per_byte(row["validation/loss"], held_out, config.model.vocab_size) for row in scores]
    curve = [(row["step"] * bytes_per_step, value) for row, value in zip(scores, bits, strict=True)]
    return Result(tok.vocab_size, held_out, scores[-1]["validation/loss"], curve)


def run(config: Config, folder, recipe: str) -> dict[str, Result]:
    """Trains what is not trained yet, and writes the report."""
    folder = workdir.prepare(folder, config, experiment="ablations.tokenizers", recipe=recipe)
    results = {name: train_one(config.pretrain, folder, name, recipe) for name in TRAINERS}
    plot(results, folder / "plots" / "bits_per_byte.png")
    text = summary(config.pretrain, results)
    write_whole(folder / "report.md", text)
    print(f"{text}\n[tokenizers] done: {folder / 'report.md'}, curves in {folder / 'plots'}", flush=True)
    return results


def summary(config: pretrain.Config, results: dict[str, Result]) -> str:
    """Returns report.md."""
    tokens = config.loop.steps * config.batch_size * config.length
    lines = [
        f"# Tokenizers compared\n\n{config.model.param_counts()['total']:,} parameters, {tokens:,} training tokens, "
        f"seed {config.seed}; scored on the whole validation text of {config.dataset}.\n",
        "| tokenizer | vocabulary | trained on bytes | held-out bytes | bytes per token | nats per token "
        "| bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (vocab_size, text, nats, curve) in results.items():
        lines.append(
            f"| {name} | {vocab_size:,} | {curve[-1][0]:,.0f} | {text.size:,} | {text.size / text.targets:.3f} | "
            f"{nats:.4f} | {curve[-1][1]:.4f} |"
        )
    return "\n".join([*lines, "\n![bits per byte](plots/bits_per_byte.png)\n"])


def plot(results: dict[str, Result], path: Path) -> None:
    """Draws bits per byte over the bytes trained on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        seen, bits = zip(*result.curve, strict=True)
        axes.plot([size / 1e6 for size in seen], bits, marker="o", ms=4, label=f"{name} {bits[-1]:.3f}")
    axes.set(xlabel="MB of training text", ylabel="bits per byte of held-out text")
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
