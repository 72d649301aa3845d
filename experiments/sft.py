"""Supervised fine-tuning on ChatML conversations (Qwen report, arXiv:2309.16609, section 3.1).

    python -m experiments.sft small --workdir runs/sft --base runs/pretrain

`small` fine-tunes what `experiments.pretrain small` left: two CPU cores, about a minute. The published recipes start
from a Hugging Face folder given with --base. With --lora.rank only LoRA adapters are trained, beside the frozen base;
what they are is left in the workdir's adapter/, in peft's format, and `python -m qwen_jax.chat --checkpoint WORKDIR`
reads base and adapters.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import pretrain
from experiments.pretrain import RouterLoss
from experiments.pretrain import small as small_pretrain
from experiments.pretrain import smoke as smoke_pretrain
from qwen_jax import config as configs
from qwen_jax import models, sharding, tokenizer
from qwen_jax.batches import LMBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import conversations, datasets
from qwen_jax.data.tokenising import Rendering
from qwen_jax.sharding import MeshConfig
from qwen_jax.training import command, pretrained, program, supervised, workdir
from qwen_jax.training.bases import from_base, keep_random, run_tokenizer, save_adapter, with_rows
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.samples import SamplesConfig


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
    rows: datasets.RowLayout = "packed"  # or "buckets": one conversation a row, padded to the least of four lengths
    too_long: conversations.TooLong = "split"  # what becomes of a conversation of more than `length` tokens
    length: int = 256
    batch_size: int = 8
    microbatches: int = 1
    validation_rows: int = 128
    samples: SamplesConfig = SamplesConfig()
    router: RouterLoss = RouterLoss()  # where the whole model is trained: LoRA leaves routers as they are
    dropout: float = 0.0  # of the embeddings and of what each layer adds, while training
    lora: LoraConfig = LoraConfig()  # rank 0: the whole model is trained
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """Human chats on the model of `pretrain small`: two CPU cores, one minute."""
    return Config(
        model=small_pretrain().model,
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule="constant", warmup_steps=20),
        loop=LoopConfig(steps=200, log_every=20, eval_every=50, checkpoint_every=100),
        samples=SamplesConfig(every=100),
    )


def smoke() -> Config:
    """Two steps from random parameters on made-up chats: seconds, no network."""
    tiny = smoke_pretrain()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, loop=tiny.loop, base="random", dataset="made-up", length=128,
        batch_size=8, validation_rows=8, samples=tiny.samples,
    )  # fmt: skip


def qwen_chat() -> Config:
    """Qwen-Chat's SFT (arXiv:2309.16609, section 3.1.2); give --base and --dataset.

    The report does not say where its dropout is. Here it falls on the embeddings and on what attention and MLP add to
    the residual stream; not on attention's probabilities, which no kernel here ever holds.
    """
    return Config(
        model=configs.get("qwen-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=2e-6, schedule="constant", warmup_steps=1430, weight_decay=0.1),
        loop=LoopConfig(steps=4000, log_every=10, eval_every=200, checkpoint_every=200),
        length=2048,
        batch_size=128,
        dropout=0.1,
        dataset="",
        template="qwen",
    )


def qwen2() -> Config:
    """Qwen2's SFT, and Qwen2.5's (arXiv:2407.10671, section 4.2; 2412.15115, section 4.1); give --base and --dataset.

    Rows of 32,768 tokens, two epochs over 500,000 examples (Qwen2.5: a million), 7e-6 falling to 7e-7, weight decay
    0.1, clipping at 1. Not published: the data, the batch (here 64 rows), the warm-up (here 1%) and the shape of the
    fall (here a cosine). Set --loop.steps to 2 x rows / 64, and --optimizer.warmup-steps to a hundredth.
    """
    return Config(
        model=configs.get("qwen2-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=7e-6, schedule="cosine", final_ratio=0.1, warmup_steps=10, weight_decay=0.1),
        loop=LoopConfig(steps=1000, log_every=10, eval_every=100, checkpoint_every=100),
        samples=SamplesConfig(every=100, max_new_tokens=256),
        length=32_768,
        batch_size=64,
        dataset="",
    )


def qwen2_size(name: str) -> Callable[[], Config]:
    """Returns the recipe of `qwen2` for a larger model, whose hyper-parameters are published for all sizes at once."""

    def recipe() -> Config:
        return dataclasses.replace(qwen2(), model=configs.get(name).replace(remat="full"))

    recipe.__doc__ = f"`qwen2` for {name}; the mesh for a slice is in docs/results/dry_run."
    return recipe


def qwen3_235b_a22b() -> Config:
    """Qwen3-235B-A22B on the rows and the rates of `qwen2`: of its own fine-tuning (arXiv:2505.09388, section 4) the
    report gives none.
    """
    return dataclasses.replace(
        qwen2(), model=configs.get("qwen3-235b-a22b").replace(remat="full"), template="qwen3", batch_size=128
    )


def qwen_lora() -> Config:
    """LoRA as QwenLM/Qwen's finetune_lora_single_gpu.sh (qwen_jax.config has its target names); give --base, --dataset.

    Rank 64, alpha 16, dropout 0.05 on c_attn, c_proj, w1, w2; 3e-4 by cosine to 0, warm-up of 1%, weight decay 0.1,
    batch 2 x 8 accumulated of 512 tokens. The script runs 5 epochs: set --loop.steps to 5 x conversations / 16, and
    --optimizer.warmup-steps to a hundredth. It differs in that conversations share rows (packing), in that of embedding
    and head only the control tokens' rows are trained, where the base has not learned them (the script trains both
    whole, on a base model), and in that the base is bfloat16 and the adapters float32 (there both bfloat16).
    """
    return Config(
        model=configs.get("qwen-7b").replace(remat="full", param_dtype="bfloat16"),
        optimizer=OptimizerConfig(peak_lr=3e-4, schedule="cosine", warmup_steps=10, weight_decay=0.1, b2=0.95),
        loop=LoopConfig(steps=1000, log_every=10, eval_every=200, checkpoint_every=1000),
        lora=LoraConfig(rank=64, alpha=16.0, dropout=0.05, targets=("c_attn", "c_proj", "w1", "w2")),
        loss="qwen-finetune",
        length=512,
        batch_size=16,
        microbatches=2,
        dataset="",
        template="qwen",
    )


def qwen_q_lora() -> Config:
    """`qwen-lora` beside a base of four bits, as QwenLM/Qwen's finetune_qlora_single_gpu.sh; give --base, --dataset.

    The script starts from a GPTQ checkpoint in four bits, and computes in float16; here any checkpoint is quantised to
    NF4 as it is read, and computed with in bfloat16. As there, the base is a chat model: one that has learned chats.
    """
    full = qwen_lora()
    return dataclasses.replace(full, lora=dataclasses.replace(full.lora, quantised="nf4"))


def chatml_4000() -> Config:
    """`qwen-chat` in full, all 4000 steps, on the model of `pretrain small` and human chats: two CPU cores.

    As published but for the width, the batch (4 rows of 256 tokens) and the peak learning rate: 2e-6 is for billions of
    parameters and hardly moves 0.9 million; 3e-4 was the best of four (docs/results/sft_4000). Source: `qwen_chat`.
    """
    full = qwen_chat()
    return dataclasses.replace(
        full,
        model=small_pretrain().model,
        optimizer=dataclasses.replace(full.optimizer, peak_lr=3e-4),
        loop=dataclasses.replace(full.loop, log_every=20),
        dataset="chitchat",
        length=256,
        batch_size=4,
    )


def lora_smollm2() -> Config:
    """`qwen-lora` on SmolLM2-135M-Instruct, a real model small enough for two CPU cores, and human chats.

    Shorter rows, rank 16 and a peak of 1e-3; the adapters' targets, dropout, weight decay and cosine are the script's.
    """
    full = qwen_lora()
    return dataclasses.replace(
        full,
        model=full.model.replace(dtype="float32", param_dtype="float32", remat="none"),
        optimizer=dataclasses.replace(full.optimizer, peak_lr=1e-3),
        loop=LoopConfig(steps=250, log_every=5, eval_every=50, checkpoint_every=50),
        lora=dataclasses.replace(full.lora, rank=16),
        dataset="chitchat",
        template="qwen2",
        loss="assistant",
        length=128,
        batch_size=4,
        microbatches=1,
        validation_rows=64,
    )


def q_lora_smollm2() -> Config:
    """`lora-smollm2` beside a base of four bits (NF4), as `qwen-q-lora` is to `qwen-lora`, and shorter."""
    full = lora_smollm2()
    return dataclasses.replace(
        full,
        loop=LoopConfig(steps=100, log_every=5, eval_every=25, checkpoint_every=25),
        lora=dataclasses.replace(full.lora, quantised="nf4"),
    )


RECIPES = {
    "small": small,
    "smoke": smoke,
    "qwen-chat": qwen_chat,
    "qwen2": qwen2,
    "qwen2-72b": qwen2_size("qwen2-72b"),
    "qwen2-57b-a14b": qwen2_size("qwen2-57b-a14b"),
    "qwen3-235b-a22b": qwen3_235b_a22b,
    "qwen-lora": qwen_lora,
    "qwen-q-lora": qwen_q_lora,
    "chatml-4000": chatml_4000,
    "lora-smollm2": lora_smollm2,
    "q-lora-smollm2": q_lora_smollm2,
}


def build(config: Config, mesh: jax.sharding.Mesh) -> program.Program:
    """Returns what a run of this config compiles on this mesh; touches no device."""
    return pretrain.build(config, mesh, lora=config.lora, dropout=config.dropout)


def rows(config: Config, tok: tokenizer.Tokenizer) -> tuple[Sequence[LMBatch], dict[str, list[LMBatch]]]:
    """Returns the packed rows to train on and those of each domain to evaluate on; says what became of the records."""
    rendering = Rendering(config.template, config.loss, config.length, config.too_long, config.format)
    how = dict(bad_records=config.bad_records, hold_out=not config.validation_dataset)
    train = datasets.rows(config.dataset, "train", tok, rendering, layout=config.rows, **how)
    held_out = datasets.held_out(
        config.validation_dataset or config.dataset, tok, rendering, count=config.validation_rows, **how
    )
    for split, told in (("train", train.told), ("validation", held_out.told)):
        for line in told:
            say("sft", f"{split}: {line}")
    return train.rows, held_out.rows


def run(config: Config, folder, recipe: str) -> tuple[Sequence[LMBatch], Sequence[LMBatch]]:
    """Fine-tunes to the end, or on from where the folder stands; returns the training and validation rows."""
    config = with_rows(from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="sft", recipe=recipe, recipes=RECIPES)
    tok = run_tokenizer(config, folder)
    train, validation = rows(config, tok)

    key = jax.random.key(config.seed)
    frozen = base_params(config, built, folder) if config.lora.rank else ()

    def initial():
        if config.lora.rank or config.base == "random":
            return built.init(key, *frozen)
        return built.start(pretrained.load_params(config.base, built.state.params), key)

    state = supervised.fit(
        built, train, validation, tok, config=config, workdir=folder, experiment="sft", recipe=recipe, initial=initial,
        lora=config.lora, frozen=frozen,
    )  # fmt: skip
    save_adapter(folder, config, state.params)
    return train, [row for some in validation.values() for row in some]


def base_params(config: Config, built: program.Program, folder: Path) -> tuple[dict]:
    """Returns the frozen parameters of a LoRA run: those of its base, quantised where asked for.

    Random ones are kept in the run's folder, or its adapters would stand beside nothing.
    """
    if config.base == "random":
        params = models.init(config.model, jax.random.key(config.seed), mesh=built.layout.mesh)
    else:
        params = pretrained.load_params(config.base, models.placed(config.model, built.layout))
    keep_random(folder, config, (params,))
    if config.lora.quantised:
        places = jax.tree.map(lambda struct: struct.sharding, built.frozen[0])
        params = jax.jit(functools.partial(models.lora.quantise, lora=config.lora), out_shardings=places)(params)
    return (params,)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
