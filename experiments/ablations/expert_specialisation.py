"""What experts learn of domains: coarse or fine experts, balanced row by row or over the whole batch.

    python -m experiments.ablations.expert_specialisation cpu --workdir runs/specialisation

Four small models with experts read English chat, Chinese reviews and Python code: each row is of one domain, a third of
the rows of each. All have as many parameters and do as much work per token: an MLP cut into 2 parts or 8, four times as
many experts as parts. Balance is asked of every row by itself, which is what frameworks do whose micro-batch is a row,
or of the whole batch (Qiu et al., arXiv:2501.11873; Qwen3 report, section 2), which the paper finds to let experts
specialise. The routers' choices on each domain's test split are compared. Those of the models before training stand
beside them, for a router that has learned nothing tells languages apart, too.

Expected (docs/results/expert_specialisation): information of domain and expert 0.20 of its most by row and 0.60 by
batch with coarse experts, 0.10 and 0.50 with fine ones, 0.03 and 0.05 before training; 6.6 minutes on two cores.
"""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from experiments import moe, pretrain
from experiments.moe import Tested
from experiments.pretrain import RouterLoss
from qwen_jax import sharding
from qwen_jax.objectives import router_use
from qwen_jax.training import command, report, router_report, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.page import Block, Picture, Table, Text
from qwen_jax.training.samples import SamplesConfig

GRAINS = {"coarse": 2, "fine": 8}  # parts of the MLP: experts per token, of four times as many
BALANCES = {"row": "per-sequence", "batch": "global-batch"}


@dataclass(frozen=True)
class Config:
    """What the runs have in common; experts and balancing loss are set here."""

    moe: moe.Config


def cpu() -> Config:
    """2.8M parameters, 1.1M active, 120 steps of 12 rows each: two CPU cores."""
    base = pretrain.small()
    run = dataclasses.replace(
        moe.with_experts(base),
        model=base.model.replace(vocab_size=2048),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=20, decay_steps=40),
        loop=LoopConfig(steps=120, log_every=10, eval_every=40, checkpoint_every=40),
        router=RouterLoss(weight=1e-2),
        dataset="chitchat:1,chinese-reviews:1,python-code:1",
        batch_size=12,
        test_rows=128,
        validation_rows=96,
        samples=SamplesConfig(prompts=0),
    )
    return Config(run)


def smoke() -> Config:
    """Two steps each of tiny models on made-up chats and Python code: seconds, no network."""
    run = dataclasses.replace(moe.with_experts(pretrain.smoke()), dataset="made-up:1,python-code:1", test_rows=8)
    return Config(dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_every=2, checkpoint_every=2)))


RECIPES = {"cpu": cpu, "smoke": smoke}


def case(config: moe.Config, grain: str, balance: str) -> moe.Config:
    """Returns the config of one of the runs."""
    parts = GRAINS[grain]
    model = config.model.replace(
        num_experts=4 * parts, num_experts_per_tok=parts, norm_topk_prob=True,
        moe_intermediate_size=config.model.intermediate_size // parts,
    )  # fmt: skip
    return dataclasses.replace(config, model=model, router=dataclasses.replace(config.router, kind=BALANCES[balance]))


def untrained(config: moe.Config, tok) -> dict[str, Tested]:
    """Returns what the routers of step 0 do with the test rows."""
    built = moe.build(config, sharding.make_mesh(config.mesh))
    params = built.init(jax.random.key(config.seed)).params
    return {name: moe.test(config, built, params, rows) for name, rows in moe.test_rows(config, tok).items()}


def run(config: Config, folder, recipe: str) -> dict[str, dict[str, Tested]]:
    """Trains what is not trained yet, and writes the report."""
    folder = workdir.prepare(
        folder, config, experiment="ablations.expert_specialisation", recipe=recipe, recipes=RECIPES
    )
    tok = pretrain.run_tokenizer(config.moe, folder)
    shared = dataclasses.replace(config.moe, tokenizer=str((folder / "tokenizer").absolute()))
    results = {f"{grain}, untrained": untrained(case(shared, grain, "batch"), tok) for grain in GRAINS}
    for grain in GRAINS:
        for balance in BALANCES:
            found = moe.run(case(shared, grain, balance), folder / f"{grain}-{balance}", recipe)
            results[f"{grain}, by {balance}"] = found
    maps = {f"{name}: {domain}": found.counts for name, each in results.items() for domain, found in each.items()}
    router_report.heat_maps(folder / "plots" / "load.png", maps, columns=len(next(iter(results.values()))))
    report.summarise(folder, title=f"expert_specialisation {recipe}", blocks=summary(config.moe, results))
    say("specialisation", f"done: {folder / 'report.md'}")
    return results


def measures(tested: dict[str, Tested]) -> dict[str, np.ndarray]:
    """Returns how a model's layers use their experts, [layers] each, every domain counting alike."""
    counts_LDE = np.stack([found.counts for found in tested.values()], axis=1)
    D = len(tested)
    all_LE, overlap_LDD = router_use.load(counts_LDE).mean(axis=1), router_use.overlap(counts_LDE)
    return {
        "information / log domains": router_use.mutual_information(counts_LDE) / np.log(D),
        "overlap": overlap_LDD[:, *np.triu_indices(D, 1)].mean(axis=-1),
        "specialists": router_use.specialists(counts_LDE),
        "entropy": router_use.entropy(all_LE),
        "entropy in a domain": router_use.entropy(counts_LDE).mean(axis=-1),
        "busiest over mean": router_use.overload(all_LE),
    }


def summary(config: moe.Config, results: dict[str, dict[str, Tested]]) -> list[Block]:
    """Returns what of the report tells how experts are used."""
    tokens, domains = config.loop.steps * config.batch_size * config.length, list(next(iter(results.values())))
    tables = {name: measures(tested) for name, tested in results.items()}
    names = list(next(iter(tables.values())))
    short = lambda values: [f"{value:.3f}" for value in values]
    means = [
        [name, *short(found.nats for found in tested.values()), *short(map(np.mean, tables[name].values()))]
        for name, tested in results.items()
    ]
    return [
        Text(f"{tokens:,} training tokens, seed {config.seed}; on test rows; means over layers."),
        Table(["model", *(f"nats, {domain}" for domain in domains), *names], means),
        Text(f"Layer by layer: {names[0]}", 2),
        Table(
            ["model", *map(str, range(config.model.num_hidden_layers))],
            [[name, *short(table[names[0]])] for name, table in tables.items()],
        ),
        Picture("plots/load.png", "load of each expert by domain"),
    ]


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
