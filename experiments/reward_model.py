"""A reward model: a score for an answer, learned from comparisons (Qwen report, arXiv:2309.16609, section 3.2.1).

    python -m experiments.reward_model small --workdir runs/reward --base runs/quickstart/sft

The base's head of the vocabulary is replaced by one to a single score, read at the end of an answer. `small` learns
which of two sentences people rated as more positive (data/ratings.py): two CPU cores, minutes; it ranks sentiment, not
helpfulness. The base is a Hugging Face folder, the workdir of a run, or "random"; where it is a reward model its score
head goes on: preference model pretraining on large, cheap data, then the fine-tune on what people said.
`report.md` has accuracy by domain and margin, calibration, and whether it likes long answers.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments import pretrain
from qwen_jax import config as configs
from qwen_jax import hf, models, objectives, sharding
from qwen_jax.batches import Loss, PreferenceBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import datasets, preferences
from qwen_jax.errors import InputError
from qwen_jax.eval import preferences as judged
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import bases, command, comparing, optimizer, pretrained, program, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.optimizer import OptimizerConfig

DOMAINS = ("films", "products", "news", "tweets")
RATINGS = ",".join(f"ratings-{name}" for name in DOMAINS)
LISTS = ",".join(f"ratings-{name}-4" for name in DOMAINS)


@dataclass(frozen=True)
class RankingLoss:
    """How comparisons are learned from; see `objectives.reward`."""

    margin: float = 0.0  # times people's margin is asked of the scores
    centring: float = 0.0
    least: float = 0.0  # comparisons whose margin is less are left out
    per_prompt: bool = False  # each prompt weighs 1, however many answers it has (InstructGPT); else each comparison


@dataclass(frozen=True)
class Config:
    """One reward model."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    loop: LoopConfig
    base: str = ""  # Hugging Face folder or workdir of a run; "random" starts from nothing
    dataset: str = RATINGS  # pairs or ranked lists: see docs/data.md
    validation_dataset: str = ""  # such another; empty: a split of the first
    validation_prompts: int = 0  # of each source that an evaluation reads; 0 for all
    test_split: str = "validation"  # of the validation data: what the report is about
    test_prompts: int = 0  # of each source
    format: str = "auto"
    bad_records: datasets.BadRecords = "error"
    template: str = "qwen2"
    too_long: str = "error"  # "drop" leaves out a comparison with an answer over `limit`; none is ever cut
    limit: int = 256  # tokens of a prompt and an answer
    length: int = 1024  # tokens in a row: it holds all answers to a prompt
    answers: int = 16  # that a row has room for
    batch_size: int = 8
    microbatches: int = 1
    ranking: RankingLoss = RankingLoss()
    dropout: float = 0.0
    lora: LoraConfig = LoraConfig()  # rank 0: the whole model is trained; the score head always is
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """Human sentence ratings on the quickstart's SFT model: two CPU cores, minutes."""
    return Config(
        model=pretrain.small().model,
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule="cosine", warmup_steps=20, final_ratio=0.05),
        loop=LoopConfig(steps=400, log_every=20, eval_every=100, checkpoint_every=100),
        dataset=LISTS, validation_dataset=RATINGS, test_split="test", ranking=RankingLoss(least=1.0), limit=512,
        length=768, answers=12, dropout=0.1,
    )  # fmt: skip


def smollm2() -> Config:
    """The same beside SmolLM2-135M, LoRA; give --base, the folder that tests/parity/smollm2.py writes."""
    base = small()
    return dataclasses.replace(
        base,
        model=base.model.replace(param_dtype="bfloat16", remat="full"),
        optimizer=OptimizerConfig(peak_lr=5e-4, schedule="cosine", warmup_steps=5, final_ratio=0.05),
        loop=LoopConfig(steps=40, log_every=2, eval_every=0, checkpoint_every=10),
        lora=LoraConfig(rank=16, alpha=32.0), dropout=0.0, length=448, limit=256, validation_prompts=10,
        test_prompts=100,
    )  # fmt: skip


def smoke() -> Config:
    """Two steps from random parameters on made-up pairs: seconds, no network."""
    tiny = pretrain.smoke()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, loop=tiny.loop, base="random", dataset="made-up-pairs", length=256,
    )  # fmt: skip


def qwen_7b() -> Config:
    """Qwen's reward model (arXiv:2309.16609, section 3.2.1); give --base, --dataset and --loop.steps of one epoch.

    3e-6 constant, batches of 64 prompts, answers of up to 2048 tokens. Its loss and end token are not published; here
    they are the ranking loss and `<|im_end|>`. A row holds a pair, so 64 rows are the batch.
    """
    return Config(
        model=configs.get("qwen-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=3e-6, schedule="constant"),
        loop=LoopConfig(steps=1000, log_every=10, eval_every=200, checkpoint_every=200),
        dataset="", template="qwen", limit=2048, length=4096, answers=2, batch_size=64, microbatches=4,
    )  # fmt: skip


def qwen_7b_pmp() -> Config:
    """Preference model pretraining (section 3.2.1): `qwen-7b` from the language model, on large data; then --base it.

    Nothing of how it was done is published but that it came first; what `qwen-7b` does is kept.
    """
    return qwen_7b()


RECIPES = {"small": small, "smoke": smoke, "smollm2": smollm2, "qwen-7b": qwen_7b, "qwen-7b-pmp": qwen_7b_pmp}


def scores(params, batch: PreferenceBatch, *, model, layout, dropout: Dropout | None = None) -> jax.Array:
    """Returns the score of each answer, [B, A] float32; of what is no answer, any number."""
    scores_BT = models.scores(
        model, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, layout=layout,
        dropout=dropout,
    )  # fmt: skip
    return jnp.take_along_axis(scores_BT, batch.ends, axis=1)


def ranking_loss(
    params,
    batch: PreferenceBatch,
    key: jax.Array,
    *,
    model: QwenConfig,
    layout: Layout,
    ranking: RankingLoss,
    frozen: tuple = (),
    lora: LoraConfig = pretrain.FULL,
    dropout: float = 0.0,
) -> Loss:
    """The objective: every comparison of the batch, from one forward pass over all answers."""
    if lora.rank:
        params = models.lora.join(*frozen, params, lora)
    noise = Dropout(key, dropout, lora.dropout) if dropout or lora.dropout else None
    scores_BA = scores(params, batch, model=model, layout=layout, dropout=noise)
    weights_BAA = objectives.reward.pairs(batch.values, batch.groups, least=ranking.least, per_group=ranking.per_prompt)
    weights, (first, second) = weights_BAA.reshape(-1), objectives.reward.both(batch.values)
    mean, metrics = objectives.reward.loss(
        *objectives.reward.both(scores_BA), margin=ranking.margin * (first - second) if ranking.margin else None,
        centring=ranking.centring, weights=weights,
    )  # fmt: skip
    return Loss.from_mean(mean, jnp.sum(weights), metrics)


def build(config: Config, mesh: jax.sharding.Mesh) -> program.Program:
    """Returns what a run of this config compiles on this mesh; touches no device. Dropout is off at evaluation."""
    model, layout = config.model.replace(head="score"), Layout(mesh)
    loss_fn = functools.partial(ranking_loss, model=model, layout=layout, ranking=config.ranking)
    return build_with(config, model, loss_fn, layout)


def build_with(config, model: QwenConfig, loss_fn, layout: Layout, *last) -> program.Program:
    """Returns the program of a model, or of its adapters, that is trained on comparisons by this loss.

    What is `last` comes behind the optimizer.
    """
    lora, rates = config.lora, {"b": config.lora.b_rate} if config.lora.b_rate != 1 else None
    if lora.quantised:
        raise InputError(
            f"lora.quantised is {lora.quantised!r}; expected '': comparisons are learned beside a whole base"
        )
    trained = dict(init_params=functools.partial(models.init, model), param_axes=models.axes(model))
    if lora.rank:
        trained = dict(
            init_params=functools.partial(models.lora.init, model, lora), param_axes=models.lora.axes(model, lora),
            frozen=[(models.abstract(model), models.axes(model))],
        )  # fmt: skip
    return program.build(
        **trained,
        loss_fn=functools.partial(loss_fn, lora=lora, dropout=config.dropout),
        eval_loss_fn=functools.partial(loss_fn, lora=dataclasses.replace(lora, dropout=0.0)),
        tx=optax.chain(optimizer.make(config.optimizer, config.loop.steps, rates=rates), *last),
        batch=comparing.batch(config),
        batch_axes=PreferenceBatch.axes(),
        layout=layout,
        microbatches=config.microbatches,
    )


def placed(model: QwenConfig, layout: Layout) -> dict:
    """Returns the parameters of a model as structs that say where they lie."""
    shapes = models.abstract(model)
    place = lambda struct, where: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=where)
    return jax.tree.map(place, shapes, sharding.tree_shardings(models.axes(model), shapes, layout))


def base_params(config: Config, layout: Layout, key: jax.Array) -> dict:
    """Returns the parameters that a run begins with: its base's, with a score head; a reward model keeps its own.

    Raises:
      InputError: as `pretrained.load_params`.
    """
    model, structs = config.model, placed(config.model, layout)
    if config.base == "random":
        return models.init(model, key, mesh=layout.mesh)
    if pretrained.read_config(config.base).head == "score":
        return pretrained.load_params(config.base, structs)
    head = structs.pop("score")
    params = pretrained.load_params(config.base, structs)
    begin = lambda key: models.with_score_head(model, {}, key)["score"]
    return params | {"score": jax.jit(begin, out_shardings=head.sharding)(key)}


def run(config: Config, folder, recipe: str) -> dict:
    """Trains to the end, or on from where the folder stands; returns what `eval.preferences.figures` says of it."""
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    config = dataclasses.replace(config, model=config.model.replace(head="score"))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="reward_model", recipe=recipe, recipes=RECIPES)
    tok = bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, "train"))
    data = comparing.data(config, tok, label="reward_model")
    key = jax.random.key(config.seed)
    frozen = (base_params(config, built.layout, key),) if config.lora.rank else ()
    keep_random(folder, config, frozen)

    def initial():
        if config.lora.rank:
            return built.init(key, *frozen)
        return built.start(base_params(config, built.layout, key), key)

    state = comparing.fit(
        built, data.train, data.validation, config=config, workdir=folder, experiment="reward_model", initial=initial,
        frozen=frozen,
    )  # fmt: skip
    if config.lora.rank:
        save_adapter(folder, config, state.params)
    found = judge(config, built, state.params, tok, frozen)
    blocks = judged.write(folder, found, of=f"{config.validation_dataset or config.dataset}, {config.test_split}")
    comparing.write_report(config, data.train, workdir=folder, title=f"reward_model {recipe}", more=blocks)
    say("reward_model", f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")
    return judged.figures(found)


def save_adapter(folder: Path, config, adapters: dict) -> None:
    """Keeps the adapters of a LoRA run in peft's format."""
    base = str(folder / pretrained.BASE) if config.base == "random" else config.base
    hf.save_adapter(folder / "adapter", config.model, hf.Adapter(config.lora, adapters), base=base)


def keep_random(folder: Path, config, frozen: tuple) -> None:
    """Keeps a random base in the run's folder, or its adapters would stand beside nothing."""
    if frozen and config.base == "random":
        hf.save(folder / pretrained.BASE, config.model, frozen[0])


def judge(config: Config, built: program.Program, params, tok: Tokenizer, frozen: tuple) -> judged.Scored:
    """Returns the scores of all answers that the report is about."""
    held_out = config.validation_dataset or config.dataset
    rows, _ = comparing.rows(config, tok, held_out, config.test_split, most=config.test_prompts)

    def of_batch(batch, params, *frozen):
        whole = models.lora.join(*frozen, params, config.lora) if frozen else params
        return scores(whole, batch, model=config.model, layout=built.layout)

    found = comparing.of_each_answer(of_batch, rows, built, params, *frozen)
    return judged.scored(rows.answers, found, least=config.ranking.least)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
