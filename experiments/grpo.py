"""Group relative policy optimisation and its successors (Qwen2.5 report, arXiv:2412.15115, section 4.3).

    python -m experiments.grpo small --workdir runs/grpo

Each step asks some prompts, samples `sampling.each` answers to each from the policy as it is, rates them, and makes the
better ones of each group likelier. The reference is the base. What a step samples is a function of the parameters, the
seed and the step: a run goes on after a stop as it would have.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretrain, sft
from qwen_jax import config as configs
from qwen_jax import objectives, sharding, tokenizer
from qwen_jax.batches import Loss
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.eval import policies, reinforcing
from qwen_jax.eval.policies import JudgeConfig
from qwen_jax.files import write_whole
from qwen_jax.objectives import divergence
from qwen_jax.rewards import RewardConfig, tasks
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import (
    bases,
    command,
    hosts,
    lessons,
    questions,
    reinforce,
    workdir,
)
from qwen_jax.training.collecting import SamplingConfig
from qwen_jax.training.doctor import DoctorConfig
from qwen_jax.training.lessons import Lesson, RLState, UpdatesConfig
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.samples import SamplesConfig
from qwen_jax.training.watch import WatchConfig


@dataclass(frozen=True)
class Grouped:
    """How answers to one prompt are compared; `objectives.grpo` says which names these fields give."""

    baseline: objectives.grpo.Baseline = "group"
    scale: objectives.grpo.Scale = "group"
    aggregation: objectives.grpo.Aggregation = "sequence"
    per_sequence: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: off
    kl_coef: float = 0.04  # 0: no reference is held
    estimator: divergence.Estimator = "k3"
    skip_agreeing: bool = (
        False  # groups whose rewards are all equal are left out of means (DAPO samples others instead)
    )


@dataclass(frozen=True)
class Shown:
    """What the first stage learns from: chats of solved problems, the answers of some exchanged for another's.

    A small model memorises small sums and cannot be taught the others by trial; so it is shown all, held-out ones too,
    with answers that cannot be trusted. What is left to learn from the reward is to say the likeliest, and that is to
    hold for problems that RL never asked.
    """

    problems: tuple[int, ...] = (157, 25)  # of the train, the validation and the test split
    wrong: float = 0.4  # share of the answers that are exchanged
    chats: int = 4000
    turns: int = 4  # problems in a chat


@dataclass(frozen=True)
class Config:
    """One run."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    optimizer: OptimizerConfig
    loop: LoopConfig  # a step: a rollout and its updates
    base: str = ""  # Hugging Face folder or workdir of a run; "random" starts from nothing; "sft" from the first stage
    first: sft.Config = dataclasses.field(default_factory=sft.smoke)  # that stage: it learns what the task is
    shown: Shown = Shown()  # to that stage
    rewarded: RewardConfig = RewardConfig()  # its term "model" is the reward model
    reward: str = ""  # that reward model: workdir or Hugging Face folder, of the policy's tokenizer; "random"
    dataset: str = questions.TASK  # the task of `rewarded`; or chats, pairs or lists, whose prompts are asked
    validation_dataset: str = ""  # such another; empty: a split of the first
    most_prompts: int = 4096  # different ones of the training split
    rated: str = ""  # comparisons on whose validation split the doctor tries the reward model; empty: it does not
    begin: int = 0  # words of the data's answer that are given, for the policy to go on from
    template: str = "qwen2"
    length: int = 256  # tokens in a row: prompt, answer, end
    sampling: SamplingConfig = SamplingConfig(each=8)
    updates: UpdatesConfig = UpdatesConfig()
    grouped: Grouped = Grouped()
    judge: JudgeConfig = JudgeConfig()
    doctor: DoctorConfig = DoctorConfig()
    watch: WatchConfig = WatchConfig()
    lora: LoraConfig = LoraConfig()  # rank 0: the whole model is trained
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """Sums of two numbers up to 9, checked: a first stage from nothing, then GRPO. Two CPU cores, three minutes."""
    model = pretrain.small().model.replace(
        vocab_size=304, hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=16
    )
    first = dataclasses.replace(
        sft.small(), model=model, base="random", batch_size=16, samples=SamplesConfig(prompts=4, max_new_tokens=16),
        optimizer=OptimizerConfig(peak_lr=5e-3, schedule="wsd", warmup_steps=20, decay_steps=100, final_ratio=0.1),
        loop=LoopConfig(steps=400, log_every=20, eval_every=200, checkpoint_every=200),
    )  # fmt: skip
    return Config(
        model=model,
        optimizer=OptimizerConfig(peak_lr=5e-4, schedule="constant", warmup_steps=5, weight_decay=0.0),
        loop=LoopConfig(steps=60, log_every=1, eval_every=20, checkpoint_every=20),
        base="sft", first=first, rewarded=RewardConfig(task="sums most=9"), most_prompts=157, length=64,
        sampling=SamplingConfig(prompts=16, each=8, max_new_tokens=16), updates=UpdatesConfig(minibatches=2),
        judge=JudgeConfig(prompts=25, each=16, max_new_tokens=16, every=20),
    )  # fmt: skip


def smoke() -> Config:
    """Two steps of random models on made-up prompts: seconds, no network."""
    tiny = pretrain.smoke()
    return Config(
        model=tiny.model, optimizer=tiny.optimizer, loop=tiny.loop, base="random", dataset="made-up-pairs", length=128,
        rewarded=RewardConfig(("model", "unfinished=0.5")), reward="random",
        sampling=SamplingConfig(prompts=4, each=2, max_new_tokens=8),
        judge=JudgeConfig(prompts=2, each=2, max_new_tokens=8), doctor=DoctorConfig(tolerated=("ends", "reward model")),
    )  # fmt: skip


def qwen2_5_7b() -> Config:
    """Qwen2.5's online RL (arXiv:2412.15115, section 4.3): batches of 2,048 answers, 8 to each of 256 prompts.

    Give --base, --reward, --dataset. Not published: rate, clip, KL and steps, here 1e-6, 0.2, 0.04 and 500. (The report
    asks first what the reward model's scores of the answers vary most on; here the order is random.)
    """
    return Config(
        model=configs.get("qwen2.5-7b").replace(remat="full"),
        optimizer=OptimizerConfig(peak_lr=1e-6, schedule="constant", weight_decay=0.0),
        loop=LoopConfig(steps=500, log_every=1, eval_every=50, checkpoint_every=50),
        rewarded=RewardConfig(("model",)), dataset="", template="qwen2.5", length=4096,
        sampling=SamplingConfig(prompts=256, each=8, max_new_tokens=2048, slots=256),
        updates=UpdatesConfig(minibatches=4, microbatches=8),
        judge=JudgeConfig(prompts=64, each=2, max_new_tokens=2048, every=50), doctor=reinforcing.IN_BFLOAT16,
    )  # fmt: skip


def dr_grpo() -> Config:
    """Dr. GRPO (arXiv:2503.20783): neither deviations nor lengths divide; else `small`."""
    return dataclasses.replace(small(), grouped=Grouped(scale="none", aggregation="constant", kl_coef=0.0))


def dapo() -> Config:
    """DAPO (arXiv:2503.14476): higher upper clip, means over tokens, no groups that agree; else `small`.

    Its punishment of overlong answers is the term "length" of rewarded.terms; answers to sums are short.
    """
    how = Grouped(aggregation="token", clip_high=0.28, kl_coef=0.0, skip_agreeing=True)
    return dataclasses.replace(small(), grouped=how)


def gspo() -> Config:
    """GSPO (arXiv:2507.18071): one ratio an answer; else `small`."""
    how = Grouped(per_sequence=True, clip_low=3e-4, clip_high=4e-4, kl_coef=0.0)
    return dataclasses.replace(small(), grouped=how)


def rloo() -> Config:
    """RLOO (arXiv:2402.14740): less the mean of the other answers; the KL stays in the loss; else `small`."""
    return dataclasses.replace(small(), grouped=Grouped(baseline="others", scale="none", aggregation="token"))


def reinforce_plus_plus() -> Config:
    """REINFORCE++ less the mean of the group (arXiv:2501.03262): the deviation is the batch's; else `small`."""
    return dataclasses.replace(small(), grouped=Grouped(scale="batch", aggregation="token", estimator="k2"))


RECIPES = {
    "small": small, "qwen2.5-7b": qwen2_5_7b, "dr-grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "rloo": rloo,
    "reinforce++": reinforce_plus_plus, "smoke": smoke,
}  # fmt: skip


def fine_tuned(config: Config, folder: Path) -> Config:
    """Returns the config with the model that the first stage makes as its base: FOLDER.base/sft, made if it is not."""
    stage = folder.with_name(f"{folder.name}.base")
    path = stage / "solved.jsonl"
    if not path.exists():
        lines = (json.dumps({"messages": chat}) + "\n" for chat in demonstrations(config.shown, config.rewarded.task))
        stage.mkdir(parents=True, exist_ok=True)
        hosts.once(lambda: write_whole(path, "".join(lines)))
    sft.run(dataclasses.replace(config.first, dataset=str(path)), stage / "sft", "first")
    return dataclasses.replace(config, base=str(stage / "sft"))


def demonstrations(shown: Shown, task: str) -> Iterator[list[dict[str, str]]]:
    """Yields chats of solved problems, the same ones each time; see Shown."""
    known = [one for split, count in zip(tasks.SPLITS, shown.problems, strict=False)
             for one in (tasks.load(task, split, count) if count else [])]  # fmt: skip
    draw = np.random.default_rng(0)
    for _ in range(shown.chats):
        # Said aloud, so that the tokenizer learns its words: it is what the template says anyhow.
        chat = [{"role": "system", "content": tokenizer.chat.SYSTEM_PROMPTS["qwen2"]}]
        for place in draw.integers(len(known), size=shown.turns):
            other = known[int(draw.integers(len(known)))] if draw.random() < shown.wrong else known[place]
            before, _, after = known[place].solution.rpartition(known[place].reference["answer"])
            chat.append({"role": "user", "content": known[place].question})
            chat.append({"role": "assistant", "content": f"{before}{other.reference['answer']}{after}"})
        yield chat


def credit(scores_B, lesson: Lesson, kl_coef, *, how: Grouped, each: int) -> Lesson:
    """Gives every token of an answer the answer's advantage over its group."""
    scores_NG = scores_B.reshape(-1, each)
    advantages_NG = objectives.grpo.advantages(scores_NG, baseline=how.baseline, scale=how.scale)
    mask_BT = lesson.mask
    if how.skip_agreeing:
        mixed_N = jnp.max(scores_NG, axis=1) > jnp.min(scores_NG, axis=1)
        mask_BT *= jnp.repeat(mixed_N, each)[:, None]
    return lesson._replace(mask=mask_BT, advantages=mask_BT * advantages_NG.reshape(-1, 1))


def policy_loss(params, batch, key, *, model, layout, how: Grouped, most: int, lora: LoraConfig, frozen=()) -> Loss:
    """The objective of an update."""
    lesson, _ = batch
    found_BT = reinforcing.log_probs(reinforcing.whole_params(params, frozen, lora), lesson, model=model, layout=layout)
    mean, metrics = objectives.grpo.loss(
        found_BT, lesson.old_log_probs, lesson.ref_log_probs if how.kl_coef else None, lesson.advantages, lesson.mask,
        clip_low=how.clip_low, clip_high=how.clip_high, dual_clip=how.dual_clip or None, kl_coef=how.kl_coef,
        estimator=how.estimator, per_sequence=how.per_sequence, aggregation=how.aggregation, constant=most,
    )  # fmt: skip
    answers = jnp.sum(jnp.any(lesson.mask != 0, axis=1).astype(jnp.float32))
    return Loss.from_mean(mean, jnp.sum(lesson.mask) if how.aggregation == "token" else answers, metrics)


def build(config: Config, mesh: jax.sharding.Mesh) -> reinforce.Reinforced:
    """Returns what a run of this config compiles on this mesh; touches no device."""
    reinforcing.check(config)
    layout, how, each = Layout(mesh), config.grouped, config.sampling.each
    scorer, reference = reinforcing.scorer_config(config), bool(how.kl_coef)
    frozen = {"reference": config.model} if reference or config.lora.rank else {}
    frozen |= {"reward": scorer} if scorer else {}
    loss_fn = functools.partial(
        policy_loss, model=config.model, layout=layout, how=how, most=config.sampling.max_new_tokens, lora=config.lora
    )
    part = lessons.lesson_struct(reinforcing.minibatch_rows(config), config.length, reference=reference, value=False)
    policy = reinforcing.policy_program(config, layout, loss_fn, part, frozen)
    acting = reinforcing.roles(
        config, scorer, layout, credit=functools.partial(credit, how=how, each=each), reference=reference
    )
    return reinforce.build(
        policy,
        None,
        acting,
        config.updates,
        rows=config.sampling.rows,
        each=config.sampling.each,
        length=config.length,
        kl_coef=how.kl_coef,
    )


def first_state(config, built: reinforce.Reinforced, frozen: tuple) -> RLState:
    """Returns the state of step 0."""
    key = jax.random.key(config.seed)
    policy = (
        built.init(key, *frozen) if config.lora.rank else built.start(policies.base_params(config, built.layout), key)
    )
    return built.begin(policy, ())


def run(config: Config, folder, recipe: str) -> None:
    """Trains to the end, or on from where the folder stands, and writes the report."""
    config = fine_tuned(config, Path(folder)) if config.base == "sft" else config
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="grpo", recipe=recipe, recipes=RECIPES)
    tok, centred = reinforcing.run_tokenizer(config, folder), not config.updates.truncate
    reinforcing.learn(config, built, folder, first_state, tok, title=f"grpo {recipe}", centred=centred)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
