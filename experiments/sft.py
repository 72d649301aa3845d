"""Supervised fine-tuning on ChatML conversations (Qwen report, arXiv:2309.16609, section 3.1).

    python -m experiments.sft small --workdir runs/sft --base runs/pretrain

`small` fine-tunes what `experiments.pretrain small` left: two CPU cores, about a minute. The published recipes start
from a Hugging Face folder given with --base.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.pretrain import RouterLoss, build
from experiments.pretrain import small as small_pretrain
from experiments.pretrain import smoke as smoke_pretrain
from qwen_jax import config as configs
from qwen_jax import sharding, tokenizer
from qwen_jax.batches import LMBatch
from qwen_jax.config import QwenConfig
from qwen_jax.data import conversations, datasets, sources
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import command, pretrained, supervised, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Config:
    """One fine-tuning run."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    loop: LoopConfig
    base: str = ""  # Hugging Face folder or workdir of a run to start from; "random" starts from nothing
    dataset: str = "chitchat"  # a name, files, or a mixture: see data.sources
    validation_dataset: str = ""  # such another; empty: a split of the first
    format: str = "auto"  # of records in files: one of data.formats
    bad_records: datasets.BadRecords = "error"  # "skip" leaves out what cannot be learned from
    template: str = "qwen2"  # the Qwen generation whose chat format is used
    loss: str = "assistant"  # what is learned; or "last-turn", or "qwen-finetune" as the published script does
    too_long: conversations.TooLong = "split"  # what becomes of a conversation of more than `length` tokens
    length: int = 256
    batch_size: int = 8
    microbatches: int = 1
    validation_rows: int = 128
    router: RouterLoss = RouterLoss()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """Human chats on the model of `pretrain small`: two CPU cores, one minute."""
    return Config(
        model=small_pretrain().model,
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule="constant", warmup_steps=20),
        loop=LoopConfig(steps=200, log_every=20, eval_every=50, checkpoint_every=100),
    )


def smoke() -> Config:
    """Two steps from random parameters on made-up chats: seconds, no network."""
    tiny = smoke_pretrain()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, loop=tiny.loop, base="random", dataset="made-up", length=128,
        batch_size=8, validation_rows=8,
    )  # fmt: skip


def qwen_chat() -> Config:
    """Qwen-Chat's SFT (arXiv:2309.16609, section 3.1.2); give --base and --dataset.

    The report's dropout of 0.1 is not there yet: the model has none.
    """
    return Config(
        model=configs.get("qwen-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=2e-6, schedule="constant", warmup_steps=1430, weight_decay=0.1),
        loop=LoopConfig(steps=4000, log_every=10, eval_every=200, checkpoint_every=200),
        length=2048,
        batch_size=128,
        dataset="",
        template="qwen",
    )


RECIPES = {"small": small, "smoke": smoke, "qwen-chat": qwen_chat}


def from_base(config: Config, folder: Path) -> Config:
    """Returns the config with the model shape that its base has, computed as the recipe says.

    A run that has begun knows the shape itself: it goes on without its base.

    Raises:
      InputError: where no base was given, or it is neither a Hugging Face folder nor a run.
    """
    if config.base == "random":
        return config
    if not config.base:
        raise InputError('--base is missing; expected a Hugging Face folder, the workdir of a run, or "random"')
    shape = pretrained.read_config(folder if (folder / "tokenizer").exists() else config.base)
    how = {name: getattr(config.model, name) for name in ("dtype", "param_dtype", "remat", "scan_layers", "attention")}
    return dataclasses.replace(config, base=str(Path(config.base).absolute()), model=shape.replace(**how))


def run_tokenizer(config: Config, folder: Path) -> tokenizer.Tokenizer:
    """Returns the tokenizer of this run: its base's, or for a random one trained at its first start."""

    def make():
        if config.base != "random":
            return tokenizer.load(pretrained.tokenizer_path(config.base))
        chats = sources.load(config.dataset, "train")
        return tokenizer.train((message["content"] for chat in chats for message in chat), config.model.vocab_size)

    return pretrained.keep_tokenizer(folder / "tokenizer", make, at_most=config.model.vocab_size)


def rows(config: Config, tok: tokenizer.Tokenizer, split: str) -> Sequence[LMBatch]:
    """Returns the packed rows of one split, and says what became of its records."""
    rendering = Rendering(config.template, config.loss, config.length, config.too_long, config.format)
    made = datasets.rows(
        split == "validation" and config.validation_dataset or config.dataset, split, tok, rendering,
        bad_records=config.bad_records, hold_out=not config.validation_dataset,
    )  # fmt: skip
    for line in made.told:
        say("sft", f"{split}: {line}")
    return made.rows


def run(config: Config, folder, recipe: str) -> tuple[Sequence[LMBatch], Sequence[LMBatch]]:
    """Fine-tunes to the end, or on from where the folder stands; returns the training and validation rows."""
    config = from_base(config, Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="sft", recipe=recipe)
    tok = run_tokenizer(config, folder)
    train, validation = rows(config, tok, "train"), rows(config, tok, "validation").first(config.validation_rows)

    def initial():
        key = jax.random.key(config.seed)
        if config.base == "random":
            return built.init(key)
        return built.start(pretrained.load_params(config.base, built.state.params), key)

    supervised.fit(
        built, train, validation, config=config, workdir=folder, experiment="sft", recipe=recipe, initial=initial
    )
    return train, validation


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
