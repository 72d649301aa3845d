"""From a short context to a long one in stages, each longer than the last and with a greater base of RoPE.

    python -m experiments.long_context small --workdir runs/long_context

Source: Qwen2.5-1M (arXiv:2501.15383), section 3: 4,096 -> 32,768 -> 65,536 -> 131,072 -> 262,144 tokens, in the last
three a quarter of the sequences shorter than that. `qwen2.5-7b-1m` is that recipe. `small` does the same from 128 to
1,024 tokens on human chats, on two CPU cores. Documents are joined to be long enough (data.long_text). A stage is a run
of its own in stage_N_LENGTH, which starts from the model of the one before; the report holds the loss after each stage
at the length of each stage, of the same tokens cut otherwise.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import pretrain
from qwen_jax import config as configs
from qwen_jax import sharding, tokenizer
from qwen_jax.config import DualChunk
from qwen_jax.data import conversations, loader, long_text, packing, sources
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.training import command, loop, page, pretrained, report, supervised, workdir
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.page import Table, Text
from qwen_jax.training.samples import SamplesConfig

LABEL = "long_context"


@dataclass(frozen=True)
class Stage:
    """What a stage does otherwise than the others."""

    length: int  # tokens in a row, and in the longest sequence
    rope_theta: float
    steps: int
    batch_size: int
    peak_lr: float
    full: float = 0.75  # share of the sequences that are of the length; the others are shorter, packed side by side


@dataclass(frozen=True)
class Config:
    """The stages, and what they share: the fields of a stage take the place of those of `shared`."""

    shared: pretrain.Config
    stages: tuple[Stage, ...]
    base: str = ""  # what the first stage starts from, a Hugging Face folder or a run; empty: random parameters
    scored_tokens: int = 65_536  # of the validation text, a multiple of every length


def small() -> Config:
    """0.9M parameters from 128 to 1,024 tokens on human chats: two CPU cores."""
    base = pretrain.small()
    return Config(
        dataclasses.replace(
            base,
            optimizer=OptimizerConfig(schedule="cosine", warmup_steps=20, final_ratio=0.1),
            loop=dataclasses.replace(base.loop, eval_every=0, checkpoint_every=100),
            samples=SamplesConfig(prompts=0),
        ),
        stages=(
            Stage(128, 1e4, 400, 16, 3e-3, full=1.0),
            Stage(256, 1e5, 100, 8, 1e-3),
            Stage(512, 1e5, 100, 4, 1e-3),
            Stage(1024, 5e5, 100, 2, 1e-3),
        ),
    )


def smoke() -> Config:
    """Two steps of 32 and of 64 tokens on made-up chats: seconds, no network."""
    optimizer = OptimizerConfig(warmup_steps=1)
    stages = Stage(32, 1e4, 2, 8, 1e-3, full=1.0), Stage(64, 1e5, 2, 8, 1e-3)
    return Config(dataclasses.replace(pretrain.smoke(), optimizer=optimizer), stages, scored_tokens=512)


def qwen2_5_7b_1m() -> Config:
    """Qwen2.5-7B-1M's stages (arXiv:2501.15383, section 3); give --shared.dataset, --shared.tokenizer and maybe --base.

    Published are lengths, bases of RoPE and the 75 to 25 mix of sequences of the last three stages. Neither steps,
    batch nor learning rate are: those here keep 4M tokens a step and are a guess, as are the lengths of the shorter
    sequences, drawn evenly from 4,096 on. The published data was long by nature or made for retrieval; joined documents
    are not.
    """
    model = configs.get("qwen2.5-7b-1m").replace(dual_chunk=DualChunk(), remat="full")
    shared = pretrain.Config(
        model=model,
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=100, final_ratio=0.1),
        loop=LoopConfig(log_every=10, eval_every=0, checkpoint_every=100),
        dataset="",
    )
    lengths = {4096: (1e4, 1.0), 32_768: (1e6, 1.0), 65_536: (1e6, 0.75), 131_072: (5e6, 0.75), 262_144: (1e7, 0.75)}
    stages = (Stage(n, theta, 1000, 2**22 // n, 3e-5, full) for n, (theta, full) in lengths.items())
    return Config(shared, tuple(stages), scored_tokens=2**22)


RECIPES = {"small": small, "smoke": smoke, "qwen2.5-7b-1m": qwen2_5_7b_1m}


def stage_config(config: Config, stage: Stage, read_at: Stage | None = None) -> pretrain.Config:
    """Returns the run of a stage; its model may be read at the length of another."""
    shared, shape = config.shared, read_at or stage
    return dataclasses.replace(
        shared,
        model=shared.model.replace(rope_theta=stage.rope_theta, max_position_embeddings=shape.length),
        length=shape.length,
        batch_size=shape.batch_size,
        loop=dataclasses.replace(shared.loop, steps=stage.steps),
        optimizer=dataclasses.replace(shared.optimizer, peak_lr=stage.peak_lr),
    )


def text(config: pretrain.Config, tok: tokenizer.Tokenizer, split: str) -> Document:
    """Returns the texts of a split as one document."""
    texts = map(conversations.plain_text, sources.load(config.dataset, split))
    return long_text.joined(conversations.text_documents(texts, tok).documents, seed=config.seed)


def train_stage(config: Config, stage: Stage, folder: Path, base: str, texts: Sequence[Document], recipe: str) -> None:
    """Trains one stage from the model in `base`, or what of it is left."""
    run_config = stage_config(config, stage)
    built = pretrain.build(run_config, sharding.make_mesh(run_config.mesh))
    workdir.prepare(folder, run_config, experiment=LABEL, recipe=recipe)
    tok = pretrain.run_tokenizer(run_config, folder)
    read, held_out = texts
    cut = dict(shortest=config.stages[0].length, full=stage.full, seed=run_config.seed)
    train = packing.PackedRows(long_text.mixed_lengths(read, stage.length, **cut), stage.length)
    validation = packing.StreamRows([held_out], stage.length, seed=0).first(run_config.validation_rows)
    key = jax.random.key(run_config.seed)

    def initial():
        return built.start(pretrained.load_params(base, built.state.params), key) if base else built.init(key)

    supervised.fit(
        built, train, {run_config.dataset: validation}, tok, config=run_config, workdir=folder, experiment=LABEL,
        recipe=recipe, initial=initial,
    )  # fmt: skip


def loss_at(config: Config, stage: Stage, length: Stage, folder: Path, held_out: Document) -> float:
    """Returns the loss of a stage's model on validation text in rows of another stage's length."""
    run_config = stage_config(config, stage, read_at=length)
    built = pretrain.build(run_config, sharding.make_mesh(run_config.mesh))
    params = pretrained.load_params(folder, built.state.params)
    scored = Document(*(x[: config.scored_tokens + 1] for x in held_out))
    rows = packing.StreamRows([scored], length.length, seed=0).first(config.scored_tokens // length.length)
    share = sharding.share(built.batch.tokens)
    batches = loader.evaluation(rows, batch_size=run_config.batch_size, **share)
    losses = [built.eval_step(params, sharding.put(batch, built.batch)) for batch in batches]
    return float(sum(loss.total for loss in losses) / sum(loss.weight for loss in losses))


def run(config: Config, folder, recipe: str) -> list[list[float]]:
    """Runs the stages that are not done yet, and writes the report; returns the loss after each, at each length."""
    lengths = [stage.length for stage in config.stages]
    if not lengths or lengths != sorted(set(lengths)) or any(config.scored_tokens % n for n in lengths):
        raise InputError(
            f"the stages' lengths are {lengths}; expected greater ones from stage to stage, all of them divisors of "
            f"scored_tokens {config.scored_tokens}"
        )
    folder = workdir.prepare(folder, config, experiment=LABEL, recipe=recipe, recipes=RECIPES)
    tok = pretrain.run_tokenizer(config.shared, folder)
    config = dataclasses.replace(config, shared=dataclasses.replace(config.shared, tokenizer=str(folder / "tokenizer")))
    texts = [text(config.shared, tok, split) for split in ("train", "validation")]
    base, losses = config.base, []
    for number, stage in enumerate(config.stages):
        own = folder / f"stage_{number}_{stage.length}"
        train_stage(config, stage, own, base, texts, recipe)
        losses.append([loss_at(config, stage, other, own, texts[1]) for other in config.stages])
        base = str(own)
    write_whole(folder / "losses.json", json.dumps(losses))
    report.summarise(folder, title=f"long_context {recipe}", blocks=summary(config, losses))
    loop.say(LABEL, f"done: {folder / 'report.md'}, the model in {base}")
    return losses


def summary(config: Config, losses: list[list[float]]) -> list[page.Block]:
    """Returns what of the report tells the losses."""
    lengths, rows = [f"{stage.length:,}" for stage in config.stages], []
    for stage, length, of_stage in zip(config.stages, lengths, losses, strict=True):
        tokens = f"{stage.steps * stage.batch_size * stage.length:,}"
        told = [length, f"{stage.rope_theta:,.0f}", str(stage.steps), tokens, f"{stage.full:.0%}"]
        rows.append([*told, *(f"{loss:.4f}" for loss in of_stage)])
    told = (
        f"{config.shared.model.param_counts()['total']:,} parameters. Nats per token of the same "
        f"{config.scored_tokens:,} tokens of held-out text after each stage, in rows of each stage's length."
    )
    header = ["stage", "theta", "steps", "tokens", "in full", *(f"at {length}" for length in lengths)]
    return [Text("Losses", 2), Text(told), Table(header, rows)]


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
