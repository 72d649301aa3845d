"""What runs of PPO and GRPO share: the models as functions of a rollout, their program, and the run itself."""

import contextlib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen_jax import models, sharding, tokenizer
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import preferences
from qwen_jax.data.tokenising import Rendering
from qwen_jax.errors import InputError
from qwen_jax.eval import policies, reinforced
from qwen_jax.eval import preferences as preferred
from qwen_jax.sharding import Layout
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import (
    bases,
    doctor,
    examining,
    loop,
    optimizer,
    pretrained,
    program,
    questions,
    reinforce,
    report,
    throughput,
)
from qwen_jax.training.collecting import Collector
from qwen_jax.training.doctor import DoctorConfig
from qwen_jax.training.lessons import RLState

# Sampler and trainer differ by up to 0.07 nats a token in bfloat16 on a CPU, where float32 differs by 4e-6.
IN_BFLOAT16 = DoctorConfig(log_probs=0.2)

RATED = 50  # comparisons of each source that the doctor tries a reward model on


def whole_params(params, frozen: tuple, lora: LoraConfig) -> dict:
    """Returns what `models` takes as the parameters of what is trained."""
    return models.lora.join(frozen[0]["reference"], params, lora) if lora.rank else params


def log_probs(params, rows, *, model: QwenConfig, layout: Layout) -> jax.Array:
    """Returns the log-probability of each token that follows, [B, T] float32, as it was when the answer was sampled."""
    prompt_B1 = jnp.argmax(rows.mask != 0, axis=1, keepdims=True) + 1
    return models.log_probs(
        model, params, rows.tokens, jnp.roll(rows.tokens, -1, axis=1), segment_ids=rows.segment_ids,
        prompt_lengths=jnp.broadcast_to(prompt_B1, rows.tokens.shape), layout=layout,
    )  # fmt: skip


def model_rewards(rollout, *frozen, scorer: QwenConfig, layout: Layout, weight: float) -> jax.Array:
    """Returns what the frozen reward model says of each answer, weighed, [B] float32, read at its end."""
    scores_BT = models.scores(
        scorer, frozen[0]["reward"], rollout.tokens, segment_ids=rollout.segment_ids, layout=layout
    )
    return weight * jnp.take_along_axis(scores_BT, rollout.ends[:, None], axis=1)[:, 0]


def roles(config, scorer: QwenConfig | None, layout: Layout, *, credit, reference: bool, **more) -> reinforce.Roles:
    """Returns the models of a run as `reinforce` calls them."""
    of_policy = functools.partial(log_probs, model=config.model, layout=layout)
    weight = config.rewarded.weights().get(questions.MODEL, 0.0)
    return reinforce.Roles(
        policy=lambda params, rows, *frozen: of_policy(whole_params(params, frozen, config.lora), rows),
        reference=(lambda rows, *frozen: of_policy(frozen[0]["reference"], rows)) if reference else None,
        reward=functools.partial(model_rewards, scorer=scorer, layout=layout, weight=weight) if scorer else None,
        credit=credit, **{"value": None, **more},
    )  # fmt: skip


def scorer_config(config) -> QwenConfig | None:
    """Returns the shape of the reward model, None without one; that of the policy while none is named.

    Raises:
      InputError: it is named and not used.
    """
    if questions.MODEL not in config.rewarded.weights():
        if config.reward:
            raise InputError(f"reward is {config.reward!r}, and rewarded.terms does not have {questions.MODEL!r}")
        return None
    shape = config.model if config.reward in ("", "random") else pretrained.read_config(config.reward)
    return shape.replace(dtype=config.model.dtype, param_dtype=config.model.param_dtype, head="score")


def policy_program(config, layout: Layout, loss_fn, batch, frozen: dict[str, QwenConfig], text=()) -> program.Program:
    """Returns the program of the policy's updates, on (a minibatch of a Lesson, text rows or ())."""
    model, lora = config.model, config.lora
    trained = dict(init_params=lambda key, *frozen: models.init(model, key), param_axes=models.axes(model))
    if lora.rank:
        init = functools.partial(models.lora.init, model, lora)
        trained = dict(
            init_params=lambda key, frozen: init(key, frozen["reference"]), param_axes=models.lora.axes(model, lora)
        )
    steps = config.loop.steps * config.updates.each_step - config.updates.value_only
    if steps < 1:
        raise InputError(
            f"updates.value_only is {config.updates.value_only}, and the run has no more updates than that"
        )
    return program.build(
        **trained,
        loss_fn=loss_fn,
        tx=optimizer.make(config.optimizer, steps, rates={"b": lora.b_rate} if lora.b_rate != 1 else None),
        batch=(batch, text),
        layout=layout,
        microbatches=config.updates.microbatches,
        frozen=frozen_structs(frozen),
    )


def frozen_structs(frozen: dict[str, QwenConfig]) -> list:
    """Returns what `program.build` takes as frozen: one tree of models by name, or nothing."""
    shapes = {name: models.abstract(shape) for name, shape in frozen.items()}
    return [(shapes, {name: models.axes(shape) for name, shape in frozen.items()})] if frozen else []


def minibatch_rows(config) -> int:
    """Returns how many answers an update learns from.

    Raises:
      InputError: where minibatches do not divide the answers of a step.
    """
    rows, parts = config.sampling.rows, config.updates.minibatches
    if rows % parts:
        raise InputError(
            f"sampling.prompts x sampling.each = {rows} answers cannot be cut into updates.minibatches {parts}"
        )
    return rows // parts


def check(config) -> None:
    """Refuses what RL cannot be run with.

    Raises:
      InputError: one line.
    """
    if config.lora.quantised or config.lora.dropout:
        raise InputError(
            "lora.quantised and lora.dropout are not for RL; expected '' and 0: the first ratio is to be 1"
        )
    if (config.sampling.behind or config.sampling.temperature != 1) and not config.updates.truncate:
        raise InputError(
            "sampling.behind, or a sampling.temperature other than 1, draws from another policy than the one that "
            "learns, and updates.truncate is 0; expected importance weights, such as updates.truncate 2"
        )
    if config.length > config.model.max_position_embeddings:
        raise InputError(
            f"length is {config.length}, over model.max_position_embeddings {config.model.max_position_embeddings}"
        )


def frozen_params(config, folder: Path, built: reinforce.Reinforced, tok: Tokenizer) -> tuple:
    """Returns the arrays of built.frozen; the random base of adapters is kept in the folder."""
    if not built.frozen:
        return ()
    found = {}
    if "reference" in built.frozen[0]:
        found["reference"] = policies.base_params(config, built.layout)
        bases.keep_random(folder, config, (found["reference"],) if config.lora.rank else ())
    if "reward" in built.frozen[0]:
        found["reward"] = policies.load_reward(config.reward, config.model, built.layout, tok)[1]
    return (found,)


def run_tokenizer(config, folder: Path) -> Tokenizer:
    """Returns the tokenizer of this run: its base's, or one for a random base."""
    return bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, "train"))


def learn(config, built, folder: Path, first, tok: Tokenizer, *, title: str, centred: bool, mixed=None) -> None:
    """Runs the loop of a policy, whose advantages have a mean of 0 or not, and writes its report."""
    label = title.split()[0]
    say = functools.partial(loop.say, label)
    frozen = frozen_params(config, folder, built, tok)
    merge = jax.jit(lambda adapters, base: models.lora.merge(base, adapters, config.lora))
    whole = lambda params: merge(params, frozen[0]["reference"]) if config.lora.rank else params
    load = functools.partial(questions.load, config=config.rewarded, begin=config.begin)
    with contextlib.closing(questions.Rater(config.rewarded, tok, config.template, say=say)) as rater:
        collector = Collector(
            config.model, rater.render(load(config.dataset, "train", most=config.most_prompts)),
            config=config.sampling, length=config.length, stop_ids=tokenizer.chat.stop_ids(tok),
            num_tokens=tok.vocab_size, layout=built.layout, seed=config.seed, whole=whole, rate=rater,
            share=sharding.share(built.batch.rollout.tokens), mixed=mixed, signs=config.watch, say=say,
        )  # fmt: skip
        held_out = load(config.validation_dataset or config.dataset, "validation", most=config.judge.prompts)
        judge = make_judge(config, tok, rater, rater.render(held_out), frozen, built.layout)
        sample = functools.partial(
            judge.samples, key=jax.random.key(config.seed), each=config.judge.each,
            max_new_tokens=config.judge.max_new_tokens,
        )  # fmt: skip
        say(f"{config.model.param_counts()['total']:,} parameters; {config.loop.steps} steps of {config.sampling.rows} "
            f"answers; mesh {dict(built.layout.mesh.shape)}")  # fmt: skip

        def initial() -> RLState:
            state = first(config, built, frozen)
            findings = examining.examine(
                built, state, collector, frozen, tok, config.doctor,
                centred=centred, pairs=rated_pairs(config, tok, judge),
            )  # fmt: skip
            say(f"the doctor, before the first update:\n{doctor.table(findings)}")
            doctor.keep(folder, findings)
            doctor.insist(findings, config.doctor)
            return state

        flops = throughput.train_flops_per_token(config.model, config.length, frozen=bool(config.lora.rank))
        state = loop.fit(
            built, collector, config=config.loop, workdir=folder, initial=initial,
            sample=lambda params, *_: sample(whole(params)), sample_every=config.judge.every,
            flops_per_token=flops * config.updates.epochs, label=label, frozen=frozen,
        )  # fmt: skip
    bases.save_adapter(folder, config, state.params)
    report.write(
        folder,
        title=title,
        unit="the objective's",
        more=[*reinforced.write(folder), *doctor.report(doctor.read(folder))],
    )
    say(f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")


def rated_pairs(config, tok: Tokenizer, judge: policies.Judge):
    """Returns the reward model's scores of the preferred answer of held-out pairs, and of the other; None without."""
    if not config.rated or judge.scorer is None:
        return None
    rendering = Rendering(
        config.template, "last-turn", judge.scorer.max_position_embeddings, "error", "auto", pairs=True
    )
    answers, _ = preferences.load(config.rated, "validation", tok, rendering, most=RATED)
    found = preferred.scored(answers, judge.scores(answers))
    return found.chosen, found.rejected


def make_judge(config, tok: Tokenizer, rater, asked: list, frozen: tuple, layout: Layout) -> policies.Judge:
    """Returns what looks at the policy's own answers to held-out prompts."""
    held = frozen[0] if frozen else {}
    reference = held["reference"] if "reference" in held else policies.base_params(config, layout)
    domains = ["held out"] * len(asked)
    return policies.Judge(
        tok, config.model, reference, scorer_config(config), held.get("reward"), asked, domains, layout, rater
    )
