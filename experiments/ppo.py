"""Proximal policy optimisation as Qwen published it (Qwen report, arXiv:2309.16609, section 3.2.2).

    python -m experiments.ppo small --workdir runs/ppo --base runs/quickstart/sft --reward runs/reward

Four models: the policy and the value model are trained, the reference (the base) and the reward model are not. The
value model begins as the reward model, and learns alone at first. With LoRA the reference is the policy without its
adapters, and the value model is adapters beside the reward model. `small` goes on from the first words of rated
sentences, and learns to be positive: two CPU cores, minutes. What a step samples is a function of the parameters, the
seed and the step: a run goes on after a stop as it would have.
"""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import grpo, pretrain, reward_model
from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding
from qwen_jax.batches import LMBatch, Loss
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import datasets, loader, ratings
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.eval import policies, reinforcing
from qwen_jax.eval.policies import JudgeConfig
from qwen_jax.objectives import divergence, masked
from qwen_jax.rewards import RewardConfig
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import bases, command, lessons, optimizer, program, reinforce, workdir
from qwen_jax.training.collecting import SamplingConfig
from qwen_jax.training.doctor import DoctorConfig
from qwen_jax.training.lessons import Lesson, RLState, UpdatesConfig
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.watch import WatchConfig


@dataclass(frozen=True)
class Clipped:
    """The objective; see `objectives.ppo`. The report gives kl_coef and value_clip, the others are usual."""

    clip: float = 0.2
    dual_clip: float = 0.0  # 0: off
    value_clip: float = 0.15
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True  # advantages, over the rollout
    kl_coef: float = 0.04
    estimator: divergence.Estimator = "k1"  # of the distance in the rewards
    kl_target: float = 0.0  # nats an answer that kl_coef is steered to; 0: it stays
    kl_horizon: float = 1000.0  # answers, in which it may change by a fifth of itself


@dataclass(frozen=True)
class Mixing:
    """Text whose likelihood every update learns besides, against forgetting: "pretraining gradient"."""

    dataset: str = ""  # chats or texts, see docs/data.md; empty: none
    coef: float = 1.0  # weight of its loss; the report's is not published
    rows: int = 8  # in an update
    length: int = 256


@dataclass(frozen=True)
class Config:
    """One run."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    value_optimizer: OptimizerConfig
    loop: LoopConfig  # a step: a rollout and its updates
    base: str = ""  # Hugging Face folder or workdir of a run; "random" starts from nothing
    reward: str = ""  # the reward model: workdir or Hugging Face folder, of the policy's tokenizer; "random"
    rewarded: RewardConfig = RewardConfig(("model",))  # its term "model" is the reward model
    dataset: str = ratings.every()  # chats, pairs or lists, whose prompts are asked; "task": that of `rewarded`
    validation_dataset: str = ""  # such another; empty: a split of the first
    most_prompts: int = 4096  # different ones of the training split
    rated: str = ""  # comparisons on whose validation split the doctor tries the reward model; empty: it does not
    begin: int = 0  # words of the data's answer that are given, for the policy to go on from
    template: str = "qwen2"
    length: int = 256  # tokens in a row: prompt, answer, end
    sampling: SamplingConfig = SamplingConfig(top_p=0.9)
    updates: UpdatesConfig = UpdatesConfig(rewards="centred")
    clipped: Clipped = Clipped()
    mixing: Mixing = Mixing()
    judge: JudgeConfig = JudgeConfig()
    doctor: DoctorConfig = DoctorConfig()
    watch: WatchConfig = WatchConfig()
    lora: LoraConfig = LoraConfig()  # rank 0: the whole models are trained
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def qwen_14b() -> Config:
    """Qwen-14B-Chat's PPO (arXiv:2309.16609, section 3.2.2); give --base, --reward, --dataset, --mixing.dataset.

    Published: 50 updates of the value model alone, two answers to a prompt, top-p 0.9, KL 0.04, 1e-6 and 5e-6, value
    clip 0.15, rewards centred by their running mean, a pretraining gradient on far more text than PPO has. Not
    published, and chosen here: the batch (512 answers, 4 updates), one epoch, clip 0.2, lambda 0.95, the gradient's
    weight, the steps.
    """
    constant = lambda rate: OptimizerConfig(peak_lr=rate, schedule="constant", weight_decay=0.0)
    return Config(
        model=configs.get("qwen-14b").replace(remat="full"),
        optimizer=constant(1e-6),
        value_optimizer=constant(5e-6),
        loop=LoopConfig(steps=500, log_every=1, eval_every=50, checkpoint_every=50),
        dataset="", template="qwen", length=2048,
        sampling=SamplingConfig(prompts=256, each=2, max_new_tokens=1024, top_p=0.9, slots=128),
        updates=UpdatesConfig(minibatches=4, microbatches=4, value_only=50, rewards="centred"),
        mixing=Mixing(coef=0.1, rows=512, length=2048),
        judge=JudgeConfig(prompts=64, each=2, max_new_tokens=1024, every=50), doctor=reinforcing.IN_BFLOAT16,
    )  # fmt: skip


def qwen2_7b() -> Config:
    """`qwen-14b`'s settings on the shape of Qwen2-7B: for sizing. Qwen2 itself was aligned by DPO, online and off."""
    return dataclasses.replace(qwen_14b(), model=configs.get("qwen2-7b").replace(remat="full"), template="qwen2")


def small() -> Config:
    """Rated sentences gone on from, on the quickstart's SFT model: two CPU cores, three minutes."""
    full = qwen_14b()
    return dataclasses.replace(
        full,
        model=pretrain.small().model,
        optimizer=dataclasses.replace(full.optimizer, peak_lr=1e-4),
        value_optimizer=dataclasses.replace(full.value_optimizer, peak_lr=3e-4),
        loop=LoopConfig(steps=40, log_every=1, eval_every=20, checkpoint_every=20),
        rewarded=RewardConfig(("model", "unfinished")), rated=ratings.every(),
        dataset=ratings.every(), begin=2, most_prompts=1024, template="qwen2", length=96,
        sampling=SamplingConfig(prompts=24, each=2, max_new_tokens=24, top_p=0.9),
        updates=UpdatesConfig(minibatches=2, value_only=6, rewards="centred"),
        mixing=Mixing(dataset="chitchat", coef=0.1, rows=2),
        judge=JudgeConfig(prompts=64, each=4, max_new_tokens=24, every=20),
    )  # fmt: skip


def quickstart() -> Config:
    """The quickstart's last stage: `small` on tweets, as its reward model is; two minutes."""
    full = small()
    return dataclasses.replace(
        full,
        optimizer=dataclasses.replace(full.optimizer, peak_lr=2e-4),
        loop=LoopConfig(steps=30, log_every=5, eval_every=15, checkpoint_every=15),
        dataset="ratings-tweets", rated="ratings-tweets",
        judge=dataclasses.replace(full.judge, every=15),
    )  # fmt: skip


def smollm2() -> Config:
    """`small` beside SmolLM2-135M, LoRA; --base and --reward as `reward_model smollm2` has them."""
    base = small()
    return dataclasses.replace(
        base,
        model=base.model.replace(param_dtype="bfloat16", remat="full"),
        loop=LoopConfig(steps=20, log_every=1, eval_every=0, checkpoint_every=10), length=128,
        lora=LoraConfig(rank=16, alpha=32.0), mixing=Mixing(),
        updates=dataclasses.replace(base.updates, epochs=1, value_only=2),
        sampling=dataclasses.replace(base.sampling, prompts=16),
        judge=dataclasses.replace(base.judge, prompts=16, each=2, every=0),
    )  # fmt: skip


def smoke() -> Config:
    """Two steps of random models on made-up prompts: seconds, no network."""
    tiny = grpo.smoke()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, value_optimizer=tiny.optimizer, loop=tiny.loop, base="random",
        dataset=tiny.dataset, rated=tiny.dataset, reward="random", length=tiny.length,
        sampling=dataclasses.replace(tiny.sampling, top_p=0.9),
        updates=UpdatesConfig(epochs=2, minibatches=1, value_only=1, rewards="centred"),
        mixing=Mixing("made-up", rows=8, length=128), judge=tiny.judge, doctor=tiny.doctor,
    )  # fmt: skip


RECIPES = {
    "qwen-14b": qwen_14b,
    "qwen2-7b": qwen2_7b,
    "small": small,
    "quickstart": quickstart,
    "smollm2": smollm2,
    "smoke": smoke,
}


def values(params, rows, *frozen, scorer: QwenConfig, layout: Layout, lora: LoraConfig) -> jax.Array:
    """Returns what the value model expects of the answer before each token that follows, [B, T] float32."""
    whole = models.lora.join(frozen[0]["reward"], params, lora) if lora.rank else params
    return models.scores(scorer, whole, rows.tokens, segment_ids=rows.segment_ids, layout=layout)


def credit(scores_B, lesson: Lesson, kl_coef, *, how: Clipped) -> Lesson:
    """Gives every token its generalised advantage; the distance from the reference is part of its reward."""
    kl_BT = divergence.per_token(lesson.old_log_probs, lesson.ref_log_probs, estimator=how.estimator)
    rewards_BT = objectives.ppo.token_rewards(scores_B, kl_BT, lesson.mask, kl_coef=kl_coef)
    advantages_BT, returns_BT = objectives.ppo.advantages(
        rewards_BT, lesson.old_values, lesson.mask, gamma=how.gamma, lam=how.lam
    )
    if how.whiten:
        advantages_BT = masked.whiten(advantages_BT, lesson.mask)
    return lesson._replace(advantages=advantages_BT, returns=returns_BT)


def policy_loss(
    params, batch, key, *, model, layout, how: Clipped, mixing: Mixing, lora: LoraConfig, frozen: tuple
) -> Loss:
    """The policy's objective in an update, its text's included."""
    lesson, text = batch
    whole = reinforcing.whole_params(params, frozen, lora)
    found_BT = reinforcing.log_probs(whole, lesson, model=model, layout=layout)
    mean, metrics = objectives.ppo.policy_loss(
        found_BT, lesson.old_log_probs, lesson.advantages, lesson.mask, clip=how.clip, dual_clip=how.dual_clip or None
    )
    if mixing.dataset:
        text_BT = models.log_probs(
            model, whole, text.tokens, text.targets, positions=text.positions, segment_ids=text.segment_ids,
            layout=layout,
        )  # fmt: skip
        metrics["mixed_loss"], _ = objectives.sft.loss(text_BT, text.loss_mask)
        mean += mixing.coef * metrics["mixed_loss"]
    return Loss.from_mean(mean, jnp.sum(lesson.mask), metrics)


def value_loss(params, lesson: Lesson, key, *, scorer, layout, how: Clipped, lora: LoraConfig, frozen: tuple) -> Loss:
    """The value model's objective in an update."""
    found_BT = values(params, lesson, *frozen, scorer=scorer, layout=layout, lora=lora)
    mean, metrics = objectives.ppo.value_loss(
        found_BT, lesson.old_values, lesson.returns, lesson.mask, clip=how.value_clip
    )
    return Loss.from_mean(mean, jnp.sum(lesson.mask), metrics)


def build(config: Config, mesh: jax.sharding.Mesh) -> reinforce.Reinforced:
    """Returns what a run of this config compiles on this mesh; touches no device."""
    reinforcing.check(config)
    layout, how, lora = Layout(mesh), config.clipped, config.lora
    scorer = reinforcing.scorer_config(config)
    if lora.rank and scorer is None:
        raise InputError(
            'the value model is adapters beside the reward model, and rewarded.terms does not have "model"; expected '
            "it, or lora.rank 0"
        )
    critic = scorer or config.model.replace(head="score")
    frozen = {"reference": config.model} | ({"reward": scorer} if scorer else {})
    rows = reinforcing.minibatch_rows(config)
    part = lessons.lesson_struct(rows, config.length, reference=True, value=True)
    loss_fn = functools.partial(
        policy_loss, model=config.model, layout=layout, how=how, mixing=config.mixing, lora=lora
    )
    policy = reinforcing.policy_program(config, layout, loss_fn, part, frozen, text_rows(config, config.mixing.rows))
    trained = dict(init_params=lambda key, *frozen: models.init(critic, key), param_axes=models.axes(critic))
    if lora.rank:
        trained = dict(
            init_params=lambda key, frozen: models.lora.init(critic, lora, key, frozen["reward"]),
            param_axes=models.lora.axes(critic, lora),
        )  # fmt: skip
    value = program.build(
        **trained,
        loss_fn=functools.partial(value_loss, scorer=critic, layout=layout, how=how, lora=lora),
        tx=optimizer.make(config.value_optimizer, config.loop.steps * config.updates.each_step),
        batch=part, layout=layout, microbatches=config.updates.microbatches, frozen=reinforcing.frozen_structs(frozen),
    )  # fmt: skip
    acting = reinforcing.roles(
        config, scorer, layout, credit=functools.partial(credit, how=how), reference=True,
        value=functools.partial(values, scorer=critic, layout=layout, lora=lora),
        adapt=functools.partial(
            divergence.adapted, target=how.kl_target, horizon=how.kl_horizon, answers=config.sampling.rows
        ) if how.kl_target else lambda kl_coef, kl: kl_coef,
    )  # fmt: skip
    return reinforce.build(
        policy, value, acting, config.updates, rows=config.sampling.rows, each=config.sampling.each,
        length=config.length, kl_coef=how.kl_coef,
        mixed=text_rows(config, config.mixing.rows * config.updates.each_step),
    )  # fmt: skip


def text_rows(config: Config, rows: int):
    """Returns rows of the text that is mixed in, as structs; () without."""
    if not config.mixing.dataset:
        return ()
    ints, floats = (jax.ShapeDtypeStruct((rows, config.mixing.length), dtype) for dtype in (jnp.int32, jnp.float32))
    return LMBatch(ints, ints, floats, ints, ints)


def mixed_batches(config: Config, built: reinforce.Reinforced, tok):
    """Returns batches of that text, one for each step; None without."""
    mixing = config.mixing
    if not mixing.dataset:
        return None
    rendering = Rendering(config.template, "assistant", mixing.length, "split", "auto")
    rows = datasets.rows(mixing.dataset, "train", tok, rendering).rows
    share = sharding.share(built.batch.mixed.tokens)
    return loader.batches(rows, batch_size=mixing.rows * config.updates.each_step, seed=config.seed, **share)


def first_state(config: Config, built: reinforce.Reinforced, frozen: tuple, tok) -> RLState:
    """Returns the state of step 0: the policy is the base, the value model the reward model."""
    key_policy, key_value = jax.random.split(jax.random.key(config.seed))
    if config.lora.rank:
        return built.begin(built.init(key_policy, *frozen), built.value.init(key_value, *frozen))
    if "reward" in frozen[0]:
        critic = policies.load_reward(config.reward, config.model, built.layout, tok)[1]
    else:
        headed = dataclasses.replace(config, model=config.model.replace(head="score"))
        critic = reward_model.base_params(headed, built.layout, key_value)
    policy = built.start(policies.base_params(config, built.layout), key_policy)
    return built.begin(policy, built.value.start(critic, key_value))


def run(config: Config, folder, recipe: str) -> None:
    """Trains to the end, or on from where the folder stands, and writes the report."""
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="ppo", recipe=recipe, recipes=RECIPES)
    tok = reinforcing.run_tokenizer(config, folder)
    with contextlib.ExitStack() as stack:
        mixed = mixed_batches(config, built, tok)
        if mixed is not None:
            stack.callback(mixed.close)
        first = functools.partial(first_state, tok=tok)
        centred = config.clipped.whiten and not config.updates.truncate
        reinforcing.learn(config, built, folder, first, tok, title=f"ppo {recipe}", centred=centred, mixed=mixed)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
