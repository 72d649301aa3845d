"""Best-of-n: sample n answers to each prompt, keep the one a reward model likes best, write them as a file for SFT.

    python -m experiments.best_of_n small --workdir runs/best --base runs/quickstart/sft --reward runs/reward
    python -m experiments.sft small --workdir runs/rejection --base runs/quickstart/sft --dataset runs/best/best.jsonl

Rejection sampling is the second line. Taking the best of n moves the answers by at most log n - (n - 1)/n nats of KL
from the policy (Beirami et al., arXiv:2401.01879); `report.md` has the mean reward of each n beside that bound, from
all samples at once. Answers that did not end are not in the file; all are in samples/.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments import pretrain
from qwen_jax import sharding, tokenizer
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import preferences, ratings
from qwen_jax.errors import InputError
from qwen_jax.eval import policies
from qwen_jax.files import write_whole
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import bases, command, hosts, report, samples, workdir
from qwen_jax.training.loop import say
from qwen_jax.training.page import Block, Picture, Table, Text


@dataclass(frozen=True)
class Config:
    """What is asked, of whom, and who judges."""

    model: QwenConfig  # how it is computed; its shape is read from the base
    base: str = ""  # the policy: a Hugging Face folder, the workdir of a run, or "random"
    reward: str = ""  # the reward model, such another with the same tokenizer
    dataset: str = ratings.every()  # chats, pairs or lists, whose prompts are asked
    split: str = "train"
    template: str = "qwen2"
    prompts: int = 64  # how many different ones; each is asked `each` times
    each: int = 16
    at_once: int = 16  # prompts that are answered together
    max_new_tokens: int = 64
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def small() -> Config:
    """The prompts of the human sentence ratings: two CPU cores, a minute."""
    return Config(model=pretrain.small().model, prompts=4, each=64, at_once=4)


def smoke() -> Config:
    """Random models on made-up prompts: seconds, no network."""
    return Config(
        model=pretrain.smoke().model, base="random", reward="random", dataset="made-up-pairs", prompts=4, each=4,
        at_once=2, max_new_tokens=8,
    )  # fmt: skip


RECIPES = {"small": small, "smoke": smoke}


def run(config: Config, folder, recipe: str) -> list[dict]:
    """Samples, scores, and writes best.jsonl and the report; returns the figures of each n."""
    config = bases.from_base(config, Path(folder))
    if min(config.prompts, config.each, config.at_once) < 1:
        raise InputError(f"prompts {config.prompts}, each {config.each}, at_once {config.at_once}; expected 1 or more")
    layout = Layout(sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="best_of_n", recipe=recipe, recipes=RECIPES)
    tok = bases.run_tokenizer(config, folder, texts=lambda: preferences.texts(config.dataset, config.split))
    params = policies.base_params(config, layout)
    scorer, reward = policies.load_reward(config.reward, config.model, layout, tok)
    asked = preferences.prompts(config.dataset, config.split, most=config.prompts)
    ids = [tokenizer.chat.render(messages, tok, generation=config.template, add_generation_prompt=True)[0]
           for messages in asked]  # fmt: skip
    judge = policies.Judge(tok, config.model, None, scorer, reward, ids, [config.dataset] * len(ids), layout)
    found = []
    for start in range(0, len(ids), config.at_once):
        say("best_of_n", f"prompts {start} to {min(start + config.at_once, len(ids))} of {len(ids)}")
        some = dataclasses.replace(judge, prompts=ids[start : start + config.at_once])
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        found += some.samples(params, key, each=config.each, max_new_tokens=config.max_new_tokens)
    groups = [found[start : start + config.each] for start in range(0, len(found), config.each)]
    figures = policies.by_n([[sample["reward"] for sample in some] for some in groups])
    kept = [
        {"messages": [*messages, {"role": "assistant", "content": best["answer"]}], "reward": best["reward"]}
        for messages, some in zip(asked, groups, strict=True)
        if (best := max((one for one in some if one["finished"]), key=lambda one: one["reward"], default=None))
    ]
    samples.write(folder, 0, found)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    hosts.once(lambda: write_whole(folder / "best.jsonl", lines))
    hosts.once(lambda: policies.plot_by_n(folder / "plots" / "best_of_n.png", figures))
    report.summarise(folder, title=f"best_of_n {recipe}", blocks=summary(figures, len(kept), len(asked)))
    say("best_of_n", f"done: {len(kept)} of {len(asked)} prompts in {folder / 'best.jsonl'}, {folder / 'report.md'}")
    return figures


def summary(figures: list[dict], kept: int, asked: int) -> list[Block]:
    """Returns what of the report tells the rewards."""
    rows = [[str(row["n"]), f"{row['reward']:.3f} ± {row['error']:.3f}", f"{row['kl_bound']:.3f}"] for row in figures]
    return [
        Text(f"{kept} of {asked} prompts had an answer that ended; the best ones are in best.jsonl."),
        Table(["n", "mean reward of the best", "KL, at most (nats)"], rows),
        Picture("plots/best_of_n.png", "reward of the best of n against the bound of its KL"),
    ]


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
