"""Online DPO (Qwen2 report, arXiv:2407.10671, section 4.3): the policy's own answers, judged by a reward model.

    python -m experiments.online_dpo small --workdir runs/online --base runs/quickstart/sft --judge.reward runs/reward

Each step asks `batch_size` prompts of the data set, samples `each` answers from the policy as it is, scores them, and
learns from the best against the worst (a row each) with `experiments.dpo`'s loss. The reference is the base. What a
step samples is a function of the parameters, the seed and the step: a run goes on after a stop as it would have.
Held-out pairs and the report are those of `experiments.dpo`.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments import dpo
from qwen_jax import models, sharding, tokenizer
from qwen_jax.batches import PreferenceBatch
from qwen_jax.data import preferences
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError
from qwen_jax.eval import policies
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import bases, command, comparing, program, rows, workdir
from qwen_jax.training.loop import say


@dataclass(frozen=True)
class Config(dpo.Config):
    """One run: what `experiments.dpo` has, and how answers are sampled."""

    prompts: int = 1024  # different ones of the data set's training split, at most
    each: int = 8  # answers to a prompt, of which the best and the worst are compared
    max_new_tokens: int = 64


def small() -> Config:
    """The prompts of the human sentence ratings: two CPU cores, minutes."""
    offline = dpo.small()
    fields = vars(offline) | dict(
        loop=dataclasses.replace(offline.loop, steps=60, eval_every=20, checkpoint_every=20),
        dataset=offline.validation_dataset, length=512, answers=2, judge=dataclasses.replace(offline.judge, every=20),
    )  # fmt: skip
    return Config(**fields, prompts=4, max_new_tokens=48)


def smoke() -> Config:
    """Two steps of random models on made-up prompts: seconds, no network."""
    judge = dpo.JudgeConfig(reward="random", prompts=2, each=2, max_new_tokens=8)
    return Config(**vars(dpo.smoke()) | dict(answers=2, judge=judge), prompts=8, each=3, max_new_tokens=8)


RECIPES = {"small": small, "smoke": smoke}


class Sampled:
    """Batches of pairs that the policy under way has just answered."""

    def __init__(self, config: Config, judge: policies.Judge, built: program.Program, of_reference, frozen: tuple):
        self._config, self._judge, self._built, self._frozen = config, judge, built, frozen
        self._of_reference, self._params, self._index = of_reference, None, 0
        self._merge = jax.jit(lambda adapters, base: models.lora.merge(base, adapters, config.lora))

    def get_state(self) -> dict:
        return {"next_index": self._index}

    def set_state(self, state: dict) -> None:
        self._index = state["next_index"]

    def see(self, params) -> None:
        self._params = self._merge(params, *self._frozen) if self._frozen else params

    def __next__(self) -> PreferenceBatch:
        config, index = self._config, self._index
        self._index += 1
        order = np.random.default_rng([config.seed, index]).permutation(len(self._judge.prompts))
        chosen = [self._judge.prompts[place] for place in np.resize(order, config.batch_size)]
        judge = dataclasses.replace(self._judge, prompts=chosen, domains=["sampled"] * len(chosen))
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        found = judge.samples(self._params, key, each=config.each, max_new_tokens=config.max_new_tokens)
        pairs = preferences.PreferenceRows(best_and_worst(chosen, found, config.each), config.length, 2)
        if self._of_reference is not None:
            pairs.reference = self._of_reference(pairs)
        share = sharding.share(self._built.batch.tokens)
        count = config.batch_size // share["process_count"]
        mine = [pairs[place] for place in range(count * share["process_index"], count * (share["process_index"] + 1))]
        return PreferenceBatch(*(np.stack(arrays) for arrays in zip(*mine, strict=True)))


class _Documents(list):
    """Documents that know their lengths."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document.ids) for document in self])


def best_and_worst(asked: list[list[int]], found: list[dict], each: int) -> preferences.Answers:
    """Returns the answers with the highest and the lowest score to each prompt; equal scores are no comparison."""
    documents, values = _Documents(), []
    for place, prompt in enumerate(asked):
        some = sorted(found[place * each : (place + 1) * each], key=lambda sample: sample["reward"])
        for sample in (some[-1], some[0]):
            ids = np.array([*prompt, *sample["ids"]], np.int32)
            documents.append(Document(ids, np.arange(len(ids)) >= len(prompt)))
            values.append(sample["reward"])
    groups = np.repeat(np.arange(len(asked)), 2)
    return preferences.Answers(documents, np.array(values, np.float32), groups, ["sampled"] * len(asked))


def prompts(config: Config, tok: Tokenizer) -> list[list[int]]:
    """Returns the prompts of the training split, rendered for an answer.

    Raises:
      InputError: where a row is too short for two answers to the longest of them.
    """
    render = functools.partial(tokenizer.chat.render, generation=config.template, add_generation_prompt=True)
    asked = preferences.prompts(config.dataset, "train", most=config.prompts)
    ids = [render(messages, tok)[0] for messages in asked]
    longest = 2 * (max(map(len, ids)) + config.max_new_tokens)
    if longest > config.length:
        raise InputError(
            f"length is {config.length}, and the longest prompt with two answers may have {longest} tokens; make rows "
            "longer, or max_new_tokens less"
        )
    return ids


def build(config: Config, mesh: jax.sharding.Mesh) -> program.Program:
    """Returns what a run of this config compiles on this mesh; touches no device."""
    if config.answers != 2:
        raise InputError(
            f"answers is {config.answers}; expected 2: a row has the best and the worst answer to a prompt"
        )
    return dpo.build(config, mesh)


def run(config: Config, folder, recipe: str) -> None:
    """Trains to the end, or on from where the folder stands, and writes the report."""
    config = bases.with_rows(bases.from_base(config, Path(folder)), Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="online_dpo", recipe=recipe, recipes=RECIPES)
    tok = bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, "train"))
    held_out, layout = comparing.held_out(config, tok, label="online_dpo"), built.layout
    key = jax.random.key(config.seed)
    reference = policies.base_params(config, layout)
    frozen = (reference,) if config.lora.rank else ()
    bases.keep_random(folder, config, frozen)
    judge = policies.make_judge(config.judge, config.model, held_out, tok, layout, reference)
    of_reference = None
    if config.reference == "cached" and config.preference.variant not in dpo.WITHOUT_REFERENCE:
        of_batch = functools.partial(dpo.reference_log_probs, model=config.model, layout=layout)
        comparing.keep_reference(
            folder / "reference.npz", held_out, of_batch, built, lambda: reference, label="online_dpo"
        )
        of_reference = lambda some: comparing.of_each_answer(of_batch, some, built, reference)
    asked = prompts(config, tok)
    asker = dataclasses.replace(judge, prompts=asked, domains=["sampled"] * len(asked), reference=None)
    state = rows.fit(
        built, Sampled(config, asker, built, of_reference, frozen), held_out, config=config, workdir=folder,
        experiment="online_dpo", initial=lambda: dpo.first_state(config, built, key, frozen), frozen=frozen,
        sample=policies.sampler(judge, config.judge, config.lora, seed=config.seed), sample_every=config.judge.every,
    )  # fmt: skip
    bases.save_adapter(folder, config, state.params)
    comparing.write_report(config, None, workdir=folder, title=f"online_dpo {recipe}", more=policies.write(folder))
    say("online_dpo", f"done: figures in {folder / 'report.md'}, model in {folder / 'checkpoints'}")


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
