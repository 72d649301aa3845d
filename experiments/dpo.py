"""Direct preference optimisation and its siblings (arXiv:2305.18290; Qwen2.5 report, arXiv:2412.15115, section 4.2).

    python -m experiments.dpo small --workdir runs/dpo --base runs/quickstart/sft --judge.reward runs/reward

The policy begins as the base and learns from the comparisons of docs/data.md. The reference is the base: its
log-probabilities are computed once and kept in the workdir, or (--reference lora-off) are those of the policy without
its adapters, so that no second copy of the model is held. `small` learns from human sentence ratings: two CPU cores,
minutes; it learns to be positive, not helpful. With a reward model, `report.md` shows its score of the policy's own
answers against their KL from the reference; the policy itself judges held-out pairs by its implicit reward.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import pretrain
from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding
from qwen_jax.batches import Loss, PreferenceBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import preferences, ratings
from qwen_jax.errors import InputError
from qwen_jax.eval import policies
from qwen_jax.eval.policies import JudgeConfig
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout
from qwen_jax.training import bases, command, comparing, merging, pretrained, program, rows, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.merging import MergingConfig
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.state import TrainState

WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
VARIANTS = ("sigmoid", "ipo", "hinge", "robust", *WITHOUT_REFERENCE)


@dataclass(frozen=True)
class PreferenceLoss:
    """Which loss; see `objectives.dpo`. simpo, cpo and orpo need no reference."""

    variant: Literal[VARIANTS] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    per_token: bool = False  # divide log-probabilities by lengths; simpo and orpo always do
    gamma: float = 0.5  # of simpo
    nll_weight: float = 1.0  # of cpo
    least: float = 0.0  # comparisons whose margin is less are left out


@dataclass(frozen=True)
class Config(comparing.Config):
    """One run of preference optimisation."""

    preference: PreferenceLoss = PreferenceLoss()
    reference: Literal["cached", "lora-off"] = "cached"
    judge: JudgeConfig = JudgeConfig()
    merging: MergingConfig = MergingConfig()  # against the alignment tax; of full runs


def small() -> Config:
    """Human sentence ratings on the quickstart's SFT model: two CPU cores, minutes."""
    return Config(
        model=pretrain.small().model,
        optimizer=OptimizerConfig(peak_lr=3e-4, schedule="cosine", warmup_steps=10, final_ratio=0.1),
        loop=LoopConfig(steps=120, log_every=10, eval_every=40, checkpoint_every=40),
        dataset=ratings.every(4), validation_dataset=ratings.every(), validation_prompts=100,
        preference=PreferenceLoss(least=ratings.MARGIN), judge=JudgeConfig(each=64, every=40),
    )  # fmt: skip


def smoke() -> Config:
    """Two steps from random parameters on made-up pairs: seconds, no network."""
    tiny = pretrain.smoke()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, loop=tiny.loop, base="random", dataset="made-up-pairs", length=256,
    )  # fmt: skip


def qwen2_5_7b() -> Config:
    """Qwen2.5's offline DPO (arXiv:2412.15115, section 4.2): one epoch of 150,000 pairs, 7e-7; give --base, --dataset.

    Not published: beta and batch; here 0.1 and 128, those of the Online Merging Optimizer's paper, whose optimizer the
    report uses besides.
    """
    return Config(
        model=configs.get("qwen2.5-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=7e-7, schedule="cosine", warmup_steps=100, weight_decay=0.0),
        loop=LoopConfig(steps=150_000 // 128, log_every=10, eval_every=200, checkpoint_every=200),
        dataset="", template="qwen2.5", limit=8192, length=16_384, answers=2, batch_size=128, microbatches=16,
    )  # fmt: skip


RECIPES = {"small": small, "smoke": smoke, "qwen2.5-7b": qwen2_5_7b}


def reference_log_probs(batch: PreferenceBatch, params, *, model: QwenConfig, layout: Layout) -> jax.Array:
    """`models.answers.log_probs`, as `comparing.of_each_answer` calls it."""
    return models.answers.log_probs(model, params, batch, layout=layout)


def preference_loss(
    params,
    batch: PreferenceBatch,
    key: jax.Array,
    *,
    model: QwenConfig,
    layout: Layout,
    how: PreferenceLoss,
    reference: str,
    frozen: tuple = (),
    lora: LoraConfig = pretrain.FULL,
    dropout: float = 0.0,
) -> Loss:
    """The objective: every comparison of the batch, from one forward pass over all answers."""
    ref_BA = batch.reference
    if lora.rank:
        if reference == "lora-off" and how.variant not in WITHOUT_REFERENCE:
            ref_BA = jax.lax.stop_gradient(models.answers.log_probs(model, *frozen, batch, layout=layout))
        params = models.lora.join(*frozen, params, lora)
    noise = Dropout(key, dropout, lora.dropout) if dropout or lora.dropout else None
    policy_BA = models.answers.log_probs(model, params, batch, layout=layout, dropout=noise)
    weights = objectives.reward.pairs(batch.values, batch.groups, least=how.least).reshape(-1)
    both = objectives.reward.both
    policy, lengths = both(policy_BA), both(models.answers.sums(batch.loss_mask, batch))
    fields = dict(beta=how.beta, lengths=lengths, weights=weights)
    if how.variant == "simpo":
        mean, metrics = objectives.dpo.simpo(*policy, gamma=how.gamma, **fields)
    elif how.variant == "cpo":
        mean, metrics = objectives.dpo.cpo(*policy, nll_weight=how.nll_weight, **fields)
    elif how.variant == "orpo":
        mean, metrics = objectives.dpo.orpo(*policy, **fields)
    else:
        fields |= dict(lengths=lengths if how.per_token else None, label_smoothing=how.label_smoothing)
        mean, metrics = objectives.dpo.loss(*policy, *both(ref_BA), variant=how.variant, **fields)
    return Loss.from_mean(mean, jnp.sum(weights), metrics)


def build(config: Config, mesh: jax.sharding.Mesh) -> program.Program:
    """Returns what a run of this config compiles on this mesh; touches no device. Dropout is off at evaluation."""
    if config.reference == "lora-off" and not config.lora.rank:
        raise InputError('reference is "lora-off" and lora.rank is 0; expected adapters to switch off, or "cached"')
    if config.merging.kind != "none" and config.lora.rank:
        raise InputError("merging is of whole models, and lora.rank is above 0; expected one of the two")
    layout = Layout(mesh)
    loss_fn = functools.partial(
        preference_loss, model=config.model, layout=layout, how=config.preference, reference=config.reference
    )
    last = [] if config.merging.kind == "none" else [merging.online(config.merging, seed=config.seed)]
    return comparing.build(config, models.lora.trained(config.model, config.lora, layout), loss_fn, layout, *last)


def run(config: Config, folder, recipe: str) -> None:
    """Trains to the end, or on from where the folder stands, and writes the report."""
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="dpo", recipe=recipe, recipes=RECIPES)
    tok = bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, "train"))
    data = comparing.data(config, tok, label="dpo")
    key, layout = jax.random.key(config.seed), built.layout
    base = functools.partial(
        policies.base_params, config, layout
    )  # of a full run read anew each time: nothing holds it
    frozen = (base(),) if config.lora.rank else ()
    bases.keep_random(folder, config, frozen)
    reference = (lambda: frozen[0]) if frozen else base
    if config.reference == "cached" and config.preference.variant not in WITHOUT_REFERENCE:
        of_batch = functools.partial(reference_log_probs, model=config.model, layout=layout)
        parts = {"train": data.train} | {f"validation {name}": some for name, some in data.validation.items()}
        comparing.keep_reference(folder / "reference.npz", parts, of_batch, built, reference, label="dpo")
    sample = None
    if config.judge.reward:
        judge = policies.make_judge(config.judge, config.model, data.validation, tok, layout, reference())
        sample = policies.sampler(judge, config.judge, config.lora, seed=config.seed)

    state = rows.fit(
        built, data.train, data.validation, config=config, workdir=folder, experiment="dpo",
        initial=lambda: first_state(config, built, key, frozen), frozen=frozen, sample=sample,
        sample_every=config.judge.every,
    )  # fmt: skip
    bases.save_adapter(folder, config, state.params)
    comparing.write_report(config, data.train, workdir=folder, title=f"dpo {recipe}", more=policies.write(folder))
    say("dpo", f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")


def first_state(config: Config, built: program.Program, key: jax.Array, frozen: tuple) -> TrainState:
    """Returns the state of step 0; with merging, it knows what fine-tuning had added to the pretrained model."""
    if config.lora.rank:
        return built.init(key, *frozen)
    state = built.start(policies.base_params(config, built.layout), key)
    if config.merging.kind == "none":
        return state
    before = pretrained.load_params(config.merging.pretrained, built.state.params)
    begin = functools.partial(merging.begin, config.merging, seed=config.seed)
    where = jax.tree.map(lambda struct: struct.sharding, built.state.opt_state)
    return state._replace(opt_state=jax.jit(begin, out_shardings=where)(state.opt_state, state.params, before))


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
