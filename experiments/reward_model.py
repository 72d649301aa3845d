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

from experiments import pretrain
from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding
from qwen_jax.batches import Loss, PreferenceBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import preferences, ratings
from qwen_jax.eval import preferences as judged
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import bases, command, comparing, pretrained, program, rows, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class RankingLoss:
    """How comparisons are learned from; see `objectives.reward`."""

    margin: float = 0.0  # times people's margin is asked of the scores
    centring: float = 0.0
    least: float = 0.0  # comparisons whose margin is less are left out
    per_prompt: bool = False  # each prompt weighs 1, however many answers it has (InstructGPT); else each comparison


@dataclass(frozen=True)
class Config(comparing.Config):
    """One reward model."""

    test_split: str = "validation"  # of the validation data: what the report is about
    test_prompts: int = 0  # of each source
    ranking: RankingLoss = RankingLoss()


def small() -> Config:
    """Human sentence ratings on the quickstart's SFT model: two CPU cores, minutes."""
    return Config(
        model=pretrain.small().model,
        optimizer=OptimizerConfig(peak_lr=3e-3, schedule="cosine", warmup_steps=20, final_ratio=0.05),
        loop=LoopConfig(steps=600, log_every=20, eval_every=200, checkpoint_every=200),
        dataset=ratings.every(4), validation_dataset=ratings.every(), test_split="test", dropout=0.1,
        ranking=RankingLoss(least=ratings.MARGIN),
    )  # fmt: skip


def tweets() -> Config:
    """`small` on one of its four domains, the quickest to learn: the quickstart's last minute."""
    full = small()
    return dataclasses.replace(
        full,
        loop=LoopConfig(steps=60, log_every=10, eval_every=30, checkpoint_every=30),
        dataset="ratings-tweets-4",
        validation_dataset="ratings-tweets",
    )


def small_pmp() -> Config:
    """Preference model pretraining for `tweets`: comparisons of the other three domains; then give it as --base."""
    full, others = small(), [name for name in ratings.FILES if name != "tweets"]
    return dataclasses.replace(
        full,
        loop=LoopConfig(steps=100, log_every=10, eval_every=50, checkpoint_every=50),
        dataset=",".join(f"ratings-{name}-4" for name in others),
        validation_dataset=",".join(f"ratings-{name}" for name in others),
        validation_prompts=100,
    )


def smollm2() -> Config:
    """The same beside SmolLM2-135M, LoRA; give --base, the folder that tests/parity/smollm2.py writes.

    A twentieth of an epoch; tested on the first 100 pairs of each domain.
    """
    return dataclasses.replace(
        small(),
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule="cosine", warmup_steps=5, final_ratio=0.05),
        loop=LoopConfig(steps=45, log_every=3, eval_every=0, checkpoint_every=15),
        lora=LoraConfig(rank=16, alpha=32.0), dropout=0.0, batch_size=2, validation_prompts=10, test_prompts=100,
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


RECIPES = {
    "small": small,
    "tweets": tweets,
    "small-pmp": small_pmp,
    "smoke": smoke,
    "smollm2": smollm2,
    "qwen-7b": qwen_7b,
    "qwen-7b-pmp": qwen_7b_pmp,
}


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
    scores_BA = models.answers.scores(model, params, batch, layout=layout, dropout=noise)
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
    return comparing.build(config, models.lora.trained(model, config.lora, layout), loss_fn, layout)


def base_params(config: Config, layout: Layout, key: jax.Array) -> dict:
    """Returns the parameters that a run begins with: its base's, with a score head; a reward model keeps its own.

    Raises:
      InputError: as `pretrained.load_params`.
    """
    model, structs = config.model, models.placed(config.model, layout)
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
    bases.keep_random(folder, config, frozen)

    def initial():
        if config.lora.rank:
            return built.init(key, *frozen)
        return built.start(base_params(config, built.layout, key), key)

    state = rows.fit(
        built, data.train, data.validation, config=config, workdir=folder, experiment="reward_model", initial=initial,
        frozen=frozen,
    )  # fmt: skip
    bases.save_adapter(folder, config, state.params)
    found = judge(config, built, state.params, tok, frozen)
    blocks = judged.write(folder, found, of=f"{config.validation_dataset or config.dataset}, {config.test_split}")
    comparing.write_report(config, data.train, workdir=folder, title=f"reward_model {recipe}", more=blocks)
    say("reward_model", f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")
    return judged.figures(found)


def judge(config: Config, built: program.Program, params, tok: Tokenizer, frozen: tuple) -> judged.Scored:
    """Returns the scores of all answers that the report is about."""
    held_out = config.validation_dataset or config.dataset
    some, _ = comparing.rows(config, tok, held_out, config.test_split, most=config.test_prompts)

    def of_batch(batch, params, *frozen):
        whole = models.lora.join(*frozen, params, config.lora) if frozen else params
        return models.answers.scores(config.model, whole, batch, layout=built.layout)

    found = comparing.of_each_answer(of_batch, some, built, params, *frozen)
    return judged.scored(some.answers, found, least=config.ranking.least)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
