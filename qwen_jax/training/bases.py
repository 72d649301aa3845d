"""What a run that starts from a base takes from it: the model's shape, the tokenizer, the rows of control tokens."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from qwen_jax import hf, tokenizer
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import sources
from qwen_jax.errors import InputError
from qwen_jax.training import control_rows, pretrained, workdir

HOW = ("dtype", "param_dtype", "remat", "scan_layers", "attention", "vocabulary_chunks")  # how a model is computed


class Config(Protocol):
    """The fields that an experiment on a base has among its own; a frozen dataclass."""

    base: str  # Hugging Face folder, workdir of a run, or "random"
    model: QwenConfig
    lora: LoraConfig
    template: str
    dataset: str


C = TypeVar("C", bound=Config)


def from_base(config: C, folder: Path) -> C:
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
    how = {name: getattr(config.model, name) for name in HOW}
    return dataclasses.replace(config, base=str(Path(config.base).absolute()), model=shape.replace(**how))


def with_rows(config: C, folder: Path) -> C:
    """Returns the config of a LoRA run with the rows of the vocabulary that it trains; a run that has begun knows them.

    Raises:
      InputError: as `control_rows.resolve`.
    """
    if not config.lora.rank or config.base == "random":
        return config
    if (folder / "tokenizer").exists():
        lora = dataclasses.replace(config.lora, row_ids=workdir.lora_config(folder).row_ids)
    else:
        tok = tokenizer.load(pretrained.tokenizer_path(config.base))
        lora = control_rows.resolve(config.lora, config.base, tok, template=config.template)
    return dataclasses.replace(config, lora=lora)


def run_tokenizer(
    config: Config, folder: Path, *, texts: Callable[[], Iterable[str]] | None = None
) -> tokenizer.Tokenizer:
    """Returns the tokenizer of this run: its base's, or for a random one trained at its first start.

    Args:
      config: of the experiment.
      folder: of the run.
      texts: what it is trained on; the messages of config.dataset's chats if None.
    """

    def make():
        if config.base != "random":
            return tokenizer.load(pretrained.tokenizer_path(config.base))
        if texts is not None:
            return tokenizer.train(texts(), config.model.vocab_size)
        chats = sources.load(config.dataset, "train")
        return tokenizer.train((message["content"] for chat in chats for message in chat), config.model.vocab_size)

    return pretrained.keep_tokenizer(folder / "tokenizer", make, at_most=config.model.vocab_size)


def keep_random(folder: Path, config: Config, frozen: tuple) -> None:
    """Keeps a random base in the run's folder, or its adapters would stand beside nothing."""
    if frozen and config.base == "random":
        hf.save(folder / pretrained.BASE, config.model, frozen[0])


def save_adapter(folder: Path, config: Config, params: dict) -> None:
    """Keeps what a LoRA run has trained in peft's format; of another run nothing."""
    if config.lora.rank:
        base = str(folder / pretrained.BASE) if config.base == "random" else config.base
        hf.save_adapter(folder / "adapter", config.model, hf.Adapter(config.lora, params), base=base)
