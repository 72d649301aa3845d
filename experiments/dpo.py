"""Direct preference optimisation and its siblings (arXiv:2305.18290; Qwen2.5 report, arXiv:2412.15115, section 4.2).

    python -m experiments.dpo small --workdir runs/dpo --base runs/quickstart/sft --judge.reward runs/reward

The policy begins as the base and learns from the comparisons of docs/data.md. The reference is the base: its
log-probabilities are computed once and kept in the workdir, or (--reference lora-off) are those of the policy without
its adapters, so that no second copy of the model is held. `small` learns from human sentence ratings: two CPU cores,
minutes; it learns to be positive, not helpful. With a reward model, `report.md` shows its score of the policy's own
answers against their KL from the reference; the policy itself judges held-out pairs by its implicit reward.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import pretrain, reward_model
from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding, tokenizer
from qwen_jax.batches import Loss, PreferenceBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import datasets, preferences
from qwen_jax.errors import InputError
from qwen_jax.eval import policies
from qwen_jax.ops.dropout import Dropout
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import bases, command, comparing, merging, pretrained, program, workdir
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
class JudgeConfig:
    """What looks at the policy's own answers while it trains."""

    reward: str = ""  # workdir or Hugging Face folder of a reward model with the same tokenizer; empty: nobody looks
    prompts: int = 4  # different held-out prompts
    each: int = 16  # answers to each
    max_new_tokens: int = 48
    every: int = 0  # steps; 0: only at the start and the end


@dataclass(frozen=True)
class Config:
    """One run of preference optimisation."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    loop: LoopConfig
    base: str = ""  # Hugging Face folder or workdir of a run; "random" starts from nothing
    dataset: str = reward_model.RATINGS  # pairs or ranked lists: see docs/data.md
    validation_dataset: str = ""  # such another; empty: a split of the first
    validation_prompts: int = 0  # of each source that an evaluation reads; 0 for all
    format: str = "auto"
    bad_records: datasets.BadRecords = "error"
    template: str = "qwen2"
    too_long: str = "error"  # "drop" leaves out a comparison with an answer over `limit`; none is ever cut
    limit: int = 512  # tokens of a prompt and an answer
    length: int = 768  # tokens in a row: it holds all answers to a prompt
    answers: int = 12  # that a row has room for
    batch_size: int = 8
    microbatches: int = 1
    preference: PreferenceLoss = PreferenceLoss()
    reference: Literal["cached", "lora-off"] = "cached"
    judge: JudgeConfig = JudgeConfig()
    dropout: float = 0.0
    merging: MergingConfig = MergingConfig()  # against the alignment tax; of full runs
    lora: LoraConfig = LoraConfig()  # rank 0: the whole model is trained
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """Human sentence ratings on the quickstart's SFT model: two CPU cores, minutes."""
    return Config(
        model=pretrain.small().model,
        optimizer=OptimizerConfig(peak_lr=1e-4, schedule="cosine", warmup_steps=10, final_ratio=0.1),
        loop=LoopConfig(steps=150, log_every=10, eval_every=50, checkpoint_every=50),
        dataset=reward_model.LISTS, validation_dataset=reward_model.RATINGS, validation_prompts=100,
        preference=PreferenceLoss(least=1.0), judge=JudgeConfig(every=50),
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


def answer_log_probs(params, batch: PreferenceBatch, *, model, layout, dropout: Dropout | None = None) -> jax.Array:
    """Returns the log-probability of each answer, [B, A] float32; 0 where there is none."""
    log_probs_BT = models.log_probs(
        model, params, batch.tokens, batch.targets, positions=batch.positions, segment_ids=batch.segment_ids,
        layout=layout, dropout=dropout,
    )  # fmt: skip
    return of_answers(log_probs_BT * batch.loss_mask, batch)


def reference_log_probs(batch: PreferenceBatch, params, *, model, layout) -> jax.Array:
    """`answer_log_probs`, as `comparing.of_each_answer` calls it."""
    return answer_log_probs(params, batch, model=model, layout=layout)


def of_answers(x_BT: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """Returns the sums of x over each answer's tokens, [B, A]."""
    A = batch.groups.shape[1]
    own_BTA = (batch.segment_ids[:, :, None] == 1 + jnp.arange(A)[None, None]).astype(x_BT.dtype)
    return jnp.einsum("BT,BTA->BA", x_BT, own_BTA)


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
            ref_BA = jax.lax.stop_gradient(answer_log_probs(*frozen, batch, model=model, layout=layout))
        params = models.lora.join(*frozen, params, lora)
    noise = Dropout(key, dropout, lora.dropout) if dropout or lora.dropout else None
    policy_BA = answer_log_probs(params, batch, model=model, layout=layout, dropout=noise)
    weights = objectives.reward.pairs(batch.values, batch.groups, least=how.least).reshape(-1)
    both = objectives.reward.both
    policy, lengths = both(policy_BA), both(of_answers(batch.loss_mask, batch))
    if how.variant == "simpo":
        found = objectives.dpo.simpo(*policy, lengths=lengths, beta=how.beta, gamma=how.gamma, weights=weights)
    elif how.variant == "cpo":
        found = objectives.dpo.cpo(*policy, lengths=lengths, beta=how.beta, nll_weight=how.nll_weight, weights=weights)
    elif how.variant == "orpo":
        found = objectives.dpo.orpo(*policy, lengths=lengths, beta=how.beta, weights=weights)
    else:
        found = objectives.dpo.loss(
            *policy, *both(ref_BA), beta=how.beta, label_smoothing=how.label_smoothing, variant=how.variant,
            lengths=lengths if how.per_token else None, weights=weights,
        )  # fmt: skip
    return Loss.from_mean(found[0], jnp.sum(weights), found[1])


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
    return reward_model.build_with(config, config.model, loss_fn, layout, *last)


def base_params(config: Config, layout: Layout) -> dict:
    """Returns the parameters of the base: what the policy begins as, and its reference."""
    if config.base == "random":
        return models.init(config.model, jax.random.key(config.seed), mesh=layout.mesh)
    return pretrained.load_params(config.base, reward_model.placed(config.model, layout))


def run(config: Config, folder, recipe: str) -> None:
    """Trains to the end, or on from where the folder stands, and writes the report."""
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="dpo", recipe=recipe, recipes=RECIPES)
    tok = bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, "train"))
    data = comparing.data(config, tok, label="dpo")
    key, layout = jax.random.key(config.seed), built.layout
    base = functools.partial(base_params, config, layout)  # of a full run read anew each time: nothing holds it
    frozen = (base(),) if config.lora.rank else ()
    reward_model.keep_random(folder, config, frozen)
    reference = (lambda: frozen[0]) if frozen else base
    if config.reference == "cached" and config.preference.variant not in WITHOUT_REFERENCE:
        of_batch = functools.partial(reference_log_probs, model=config.model, layout=layout)
        parts = {"train": data.train} | {f"validation {name}": rows for name, rows in data.validation.items()}
        comparing.keep_reference(folder / "reference.npz", parts, of_batch, built, reference, label="dpo")
    judge = make_judge(config, tok, data.validation, layout, reference()) if config.judge.reward else None

    state = comparing.fit(
        built, data.train, data.validation, config=config, workdir=folder, experiment="dpo",
        initial=lambda: first_state(config, built, key, frozen), frozen=frozen,
        sample=judge and sampler(config, judge), sample_every=config.judge.every,
    )  # fmt: skip
    if config.lora.rank:
        reward_model.save_adapter(folder, config, state.params)
    comparing.write_report(config, data.train, workdir=folder, title=f"dpo {recipe}", more=policies.write(folder))
    say("dpo", f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")


def first_state(config: Config, built: program.Program, key: jax.Array, frozen: tuple) -> TrainState:
    """Returns the state of step 0; with merging, it knows what fine-tuning had added to the pretrained model."""
    if config.lora.rank:
        return built.init(key, *frozen)
    state = built.start(base_params(config, built.layout), key)
    if config.merging.kind == "none":
        return state
    before = pretrained.load_params(config.merging.pretrained, built.state.params)
    begin = functools.partial(merging.begin, config.merging, seed=config.seed)
    where = jax.tree.map(lambda struct: struct.sharding, built.state.opt_state)
    return state._replace(opt_state=jax.jit(begin, out_shardings=where)(state.opt_state, state.params, before))


def sampler(config: Config, judge: policies.Judge) -> Callable[..., list[dict]]:
    """Returns (params, *frozen) -> what the judge says of the policy's answers to held-out prompts."""

    def sample(params, *frozen) -> list[dict]:
        params = models.lora.merge(*frozen, params, config.lora) if frozen else params
        key = jax.random.key(config.seed)
        return judge.samples(params, key, each=config.judge.each, max_new_tokens=config.judge.max_new_tokens)

    return sample


def make_judge(config: Config, tok: tokenizer.Tokenizer, held_out: dict, layout: Layout, reference: dict):
    """Returns the `policies.Judge` of the policy's answers to held-out prompts; raises as `load_reward`."""
    prompts, domains = [], []
    for name, rows in held_out.items():
        found = policies.distinct_prompts(rows.answers, -(-config.judge.prompts // len(held_out)))
        prompts, domains = prompts + found[0], domains + [name] * len(found[0])
    scorer, reward = load_reward(config.judge.reward, config.model, layout, tok)
    return policies.Judge(tok, config.model, reference, scorer, reward, prompts, domains, layout)


def load_reward(path: str, policy: QwenConfig, layout: Layout, tok: tokenizer.Tokenizer) -> tuple[QwenConfig, dict]:
    """Returns config and parameters of a reward model, computed in the policy's types; "random" is one nobody trained.

    Raises:
      InputError: where none was given, it has no score head, or other tokens than the policy.
    """
    if path == "random":
        scorer = policy.replace(head="score")
        return scorer, models.init(scorer, jax.random.key(1), mesh=layout.mesh)
    if not path:
        raise InputError("no reward model was given; expected the workdir or the Hugging Face folder of one")
    scorer = pretrained.read_config(path).replace(dtype=policy.dtype, param_dtype=policy.param_dtype)
    if scorer.head != "score":
        raise InputError(f"{path} has no score head: expected a reward model")
    if not policies.same_tokens(tok, tokenizer.load(pretrained.tokenizer_path(path))):
        raise InputError(f"{path} has another tokenizer than the policy; expected a reward model of the same base")
    return scorer, pretrained.load_params(path, reward_model.placed(scorer, layout))


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
