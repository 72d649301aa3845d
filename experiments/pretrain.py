"""Pretraining: next-token prediction on plain text, documents shuffled, joined and cut (Qwen report, section 2.1).

    python -m experiments.pretrain small --workdir runs/pretrain

`small` trains a 0.9-million-parameter model on the text of 4,000 human chats on two CPU cores: about 3 minutes, from
6.9 to 3.83 nats per token on held-out chats (a Kneser-Ney bigram of the same tokens: 4.10). `smoke` takes seconds and
needs no network.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding, tokenizer
from qwen_jax.batches import LMBatch, Loss
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import conversations, packing, sources
from qwen_jax.errors import InputError
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import command, optimizer, pretrained, program, supervised, workdir
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.samples import SamplesConfig

FULL = LoraConfig()  # of rank 0: the whole model is trained


@dataclass(frozen=True)
class RouterLoss:
    """What the router of a model with experts is trained by besides the tokens; a dense model has none."""

    kind: Literal[objectives.balance.KINDS] = "global-batch"  # see objectives.balance
    weight: float = 1e-3  # router_aux_loss_coef of the published models
    z_weight: float = 0.0


@dataclass(frozen=True)
class Config:
    """One pretraining run."""

    model: QwenConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    dataset: str = "chitchat"  # a name, files, or a mixture: see data.sources
    tokenizer: str = ""  # file or folder; empty: one of model.vocab_size tokens is trained on the training split
    length: int = 256  # tokens in a row
    batch_size: int = 8  # rows in a step
    microbatches: int = 1  # pieces of a batch held at a time
    validation_rows: int = 128  # how many rows each evaluation reads
    samples: SamplesConfig = SamplesConfig()
    router: RouterLoss = RouterLoss()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """0.9M parameters on human chats: two CPU cores, 3 minutes."""
    model = QwenConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, rope_theta=1e4, tie_word_embeddings=True,
        initializer_range=0.06, dtype="float32",
    )  # fmt: skip
    return Config(
        model=model,
        optimizer=OptimizerConfig(peak_lr=3e-3, schedule="wsd", warmup_steps=50, decay_steps=250, final_ratio=0.05),
        loop=LoopConfig(steps=600, log_every=20, eval_every=100, checkpoint_every=200),
        samples=SamplesConfig(every=200),
    )


def smoke() -> Config:
    """Two steps of a tiny model on made-up chats: seconds, no network."""
    base = small()
    return dataclasses.replace(
        base,
        model=base.model.replace(vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=1),
        loop=LoopConfig(steps=2, log_every=1, eval_every=1, checkpoint_every=1),
        dataset="made-up",
        length=64,
        batch_size=8,
        validation_rows=8,
        samples=SamplesConfig(prompts=0),
    )


def qwen_7b() -> Config:
    """Qwen-7B's pretraining (arXiv:2309.16609, section 2.4), 2.4T tokens; give --dataset and --tokenizer.

    Warm-up, weight decay and clipping are the tech memo's of the first Qwen-7B. Published is neither the data nor the
    remat and accumulation chosen here.
    """
    return Config(
        model=configs.get("qwen-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=3e-4, schedule="cosine", warmup_steps=2000, final_ratio=0.1),
        loop=LoopConfig(steps=572_000, log_every=10, eval_every=1000, checkpoint_every=1000),
        length=2048,
        batch_size=2048,
        microbatches=4,
        dataset="",
    )


RECIPES = {"small": small, "smoke": smoke, "qwen-7b": qwen_7b}


def language_model_loss(
    params,
    batch: LMBatch,
    key: jax.Array,
    tally=None,
    *,
    model: QwenConfig,
    layout: Layout,
    router: RouterLoss | None = None,
    frozen: tuple = (),
    lora: LoraConfig = FULL,
    dropout: float = 0.0,
) -> Loss:
    """The objective of pretraining and of fine-tuning: they differ in the data's mask alone.

    Args:
      params: the model, or the adapters of `lora` beside the `frozen` one.
      batch: packed rows.
      key: of dropout.
      tally: of `router`, which is for models with experts and adds their balancing loss; None leaves the likelihood of
        the tokens alone.
      dropout: rate of the model's own; the adapters' is in `lora`.
    """
    if lora.rank:
        params = models.lora.join(*frozen, params, lora)
    noise = Dropout(key, dropout, lora.dropout) if dropout or lora.dropout else None
    log_probs_BT, routing = models.log_probs_and_routing(
        model, params, batch.tokens, batch.targets, positions=batch.positions, segment_ids=batch.segment_ids,
        layout=layout, dropout=noise,
    )  # fmt: skip
    mean, metrics = objectives.sft.loss(log_probs_BT, batch.loss_mask)
    weight = jnp.sum(batch.loss_mask)
    if routing is None or router is None:
        return Loss.from_mean(mean, weight, metrics)
    extra, more, tally = objectives.balance.loss(
        routing.counts, routing.probs, routing.z, routing.tokens, before=tally, **dataclasses.asdict(router)
    )
    return Loss.from_mean(mean + extra, weight, metrics | more, tally)


def build(config, mesh: jax.sharding.Mesh, *, lora=FULL, dropout: float = 0.0) -> program.Program:
    """Returns what a run of this config compiles on this mesh; touches no device. Dropout is off at evaluation."""
    layout = Layout(mesh)
    if config.seed < 0:
        raise InputError(f"seed is {config.seed}; expected 0 or more")
    if config.length > config.model.max_position_embeddings:
        raise InputError(
            f"length is {config.length}, over model.max_position_embeddings {config.model.max_position_embeddings}"
        )
    ints = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    floats = jax.ShapeDtypeStruct(ints.shape, jnp.float32)
    loss_fn = functools.partial(language_model_loss, model=config.model, layout=layout)
    return program.build(
        **models.lora.trained(config.model, lora, layout),
        loss_fn=functools.partial(loss_fn, router=None if lora.rank else config.router, lora=lora, dropout=dropout),
        eval_loss_fn=functools.partial(loss_fn, lora=dataclasses.replace(lora, dropout=0.0)),
        tx=optimizer.make(config.optimizer, config.loop.steps, rates={"b": lora.b_rate} if lora.b_rate != 1 else None),
        batch=LMBatch(tokens=ints, targets=ints, loss_mask=floats, segment_ids=ints, positions=ints),
        layout=layout,
        microbatches=config.microbatches,
    )


def run_tokenizer(config: Config, folder: Path) -> tokenizer.Tokenizer:
    """Returns the tokenizer of this run, loaded or trained at its first start.

    Raises:
      InputError: where it has more tokens than the model.
    """

    def make():
        if config.tokenizer:
            return tokenizer.load(config.tokenizer)
        print(f"[pretrain] training a tokenizer of {config.model.vocab_size} tokens", flush=True)
        texts = map(conversations.plain_text, sources.load(config.dataset, "train"))
        return tokenizer.train(texts, config.model.vocab_size)

    return pretrained.keep_tokenizer(folder / "tokenizer", make, at_most=config.model.vocab_size)


def text_rows(
    config: Config, tok: tokenizer.Tokenizer, dataset: str, split: str, *, hold_out: bool = True
) -> packing.StreamRows:
    """Returns the rows of one split of a data set: its texts joined and cut."""
    texts = map(conversations.plain_text, sources.load(dataset, split, hold_out=hold_out))
    return packing.StreamRows(conversations.text_documents(texts, tok).documents, config.length, seed=config.seed)


def rows(
    config: Config, tok: tokenizer.Tokenizer
) -> tuple[packing.StreamRows | packing.MixedRows, dict[str, list[LMBatch]]]:
    """Returns the rows to train on, those of sources with weights apart, and those to evaluate on, source by source."""
    names, weights = zip(*sources.weighted(config.dataset), strict=True)
    held_out = {
        short: text_rows(config, tok, name, "validation")
        for short, name in zip(sources.short_names(names), names, strict=True)
    }
    if weights[0] is None:
        return text_rows(config, tok, config.dataset, "train"), packing.first_of_each(held_out, config.validation_rows)
    train = packing.MixedRows([text_rows(config, tok, name, "train") for name in names], weights)
    return train, packing.first_of_each(held_out, config.validation_rows, weights)


def run(config: Config, folder, recipe: str) -> tuple[Sequence[LMBatch], Sequence[LMBatch]]:
    """Trains to the end, or on from where the folder stands; returns the training and validation rows."""
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="pretrain", recipe=recipe, recipes=RECIPES)
    tok = run_tokenizer(config, folder)
    train, validation = rows(config, tok)
    supervised.fit(
        built, train, validation, tok, config=config, workdir=folder, experiment="pretrain", recipe=recipe,
        initial=lambda: built.init(jax.random.key(config.seed)),
    )  # fmt: skip
    return train, [row for some in validation.values() for row in some]


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
