"""Training experts, start to end: data in three splits, a start, the router trained along, a test (Qwen3 report, 2).

    python -m experiments.moe small --workdir runs/moe
    python -m experiments.moe small --workdir runs/upcycled --base runs/pretrain

The model begins with random parameters, or with those of --base, a Hugging Face folder or the workdir of a run: one
with experts as it is, a dense one upcycled (models.upcycling). Each step adds the router's balancing loss to that of
the tokens. Validation ranks checkpoints while it trains; the test split is read once, at the end: loss, and what the
routers did with it, layer by layer, in test.md and test.json. (Without experts: the loss.)

`small`: 2.7M parameters, 0.9M of them active, on human chats; two CPU cores. Each balancing loss is a recipe.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretrain
from experiments.pretrain import RouterLoss
from qwen_jax import config as configs
from qwen_jax import models, objectives, sharding
from qwen_jax.batches import LMBatch
from qwen_jax.data import loader, sources
from qwen_jax.files import write_whole
from qwen_jax.training import bases, command, hosts, page, pretrained, program, router_report, supervised, workdir
from qwen_jax.training.page import Picture, Table, Text

EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
           "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")  # fmt: skip


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of a dense MLP, where --base has none: see models.upcycling."""

    shuffle: bool = True
    reinitialize: float = 0.5


@dataclass(frozen=True)
class Config(pretrain.Config):
    """One run; without experts in `model` it is a dense model's, to compare with."""

    base: str = "random"  # or a Hugging Face folder or workdir: its shape counts, its experts, too, where it has any
    upcycling: Upcycling = Upcycling()
    test_dataset: str = ""  # read whole; empty: the split of `dataset` that is called test
    test_rows: int = 512  # at most so many of each source


def with_experts(dense: pretrain.Config, **experts) -> Config:
    """Returns a run like another, its MLPs replaced by experts."""
    fields = {field.name: getattr(dense, field.name) for field in dataclasses.fields(pretrain.Config)}
    return Config(**fields | dict(model=dense.model.replace(**experts)))


def small() -> Config:
    """`pretrain small` with 16 fine-grained experts in the place of each MLP, 4 of them a token: as much work."""
    experts = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96, norm_topk_prob=True)
    return with_experts(pretrain.small(), **experts)


def small_with(**router) -> Callable[[], Config]:
    """Returns the recipe of `small` with another loss of the router."""

    def recipe() -> Config:
        return dataclasses.replace(small(), router=RouterLoss(**router))

    recipe.__doc__ = f"`small` with {', '.join(f'router.{name} {value}' for name, value in router.items())}."
    return recipe


def qwen2_57b_a14b() -> Config:
    """Qwen2-57B-A14B from Qwen2-7B (arXiv:2407.10671, section 2.2.2), 4.5T tokens; give --base and --dataset.

    Published are the shape, the upcycling and the tokens; the rate, the batch and the balancing loss are chosen here.
    """
    dense = pretrain.qwen_7b()
    return dataclasses.replace(
        small(),
        model=configs.get("qwen2-57b-a14b").replace(remat="full"),
        optimizer=dataclasses.replace(dense.optimizer, peak_lr=1e-4),
        loop=dataclasses.replace(dense.loop, steps=536_000),
        dataset="", length=4096, batch_size=2048, microbatches=4,
    )  # fmt: skip


def smoke() -> Config:
    """Two steps of a tiny model on made-up chats: seconds, no network."""
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    return dataclasses.replace(with_experts(pretrain.smoke(), **experts), test_rows=8)


RECIPES = {
    "small": small,
    **{f"small-{kind}": small_with(kind=kind) for kind in objectives.balance.KINDS[1:]},
    "small-unbalanced": small_with(weight=0.0),
    "small-router-z": small_with(z_weight=1e-3),
    "qwen2-57b-a14b": qwen2_57b_a14b,
    "smoke": smoke,
}


class Tested(NamedTuple):
    """What a model did with the rows of one source.

    Attributes:
      nats: its loss, nats per token.
      tokens: how many those were.
      counts: [layers with experts, E] how often each expert was chosen; None of a dense model.
    """

    nats: float
    tokens: int
    counts: np.ndarray | None


build = pretrain.build


def from_base(config: Config, folder: Path) -> Config:
    """Returns the config with the shape of its base, and with its own experts where that has none.

    Raises:
      InputError: where the base is neither a Hugging Face folder nor a run.
    """
    found = bases.from_base(config, folder)
    if found.base == "random" or found.model.num_experts:
        return found
    own = {name: getattr(config.model, name) for name in EXPERTS}
    return dataclasses.replace(found, model=found.model.replace(**own))


def initial(config: Config, built: program.Program):
    """Makes the state of step 0: random, the base's, or upcycled from it."""
    key, layout = jax.random.key(config.seed), built.layout
    if config.base == "random":
        return built.init(key)
    base = pretrained.read_config(config.base).replace(param_dtype=config.model.param_dtype)
    if base.num_experts or not config.model.num_experts:
        return built.start(pretrained.load_params(config.base, built.state.params), key)
    shapes = models.abstract(base)
    struct = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    dense = jax.tree.map(struct, shapes, sharding.tree_shardings(models.axes(base), shapes, layout))
    params = models.upcycle(
        base, pretrained.load_params(config.base, dense), config.model, key,
        mesh=layout.mesh, **dataclasses.asdict(config.upcycling),
    )  # fmt: skip
    return built.start(params, key)


def test_rows(config: Config, tok) -> dict[str, list[LMBatch]]:
    """Returns the rows to test on, source by source."""
    names, how = sources.names(config.test_dataset or config.dataset), dict(hold_out=not config.test_dataset)
    rows = [pretrain.text_rows(config, tok, name, "test", **how).first(config.test_rows) for name in names]
    return dict(zip(sources.short_names(names), rows, strict=True))


def test(config: Config, built: program.Program, params, rows: Sequence[LMBatch]) -> Tested:
    """Reads rows once, without learning from them."""

    def of_batch(params, batch: LMBatch):
        log_probs_BT, routing = models.log_probs_and_routing(
            config.model, params, batch.tokens, batch.targets,
            positions=batch.positions, segment_ids=batch.segment_ids, layout=built.layout,
        )  # fmt: skip
        weight = jnp.sum(batch.loss_mask)
        counts_LE = None if routing is None else jnp.sum(routing.counts, axis=1)
        return objectives.sft.loss(log_probs_BT, batch.loss_mask)[0] * weight, weight, counts_LE

    step = jax.jit(of_batch, out_shardings=sharding.replicated(built.layout))
    batches = loader.evaluation(rows, batch_size=config.batch_size, **sharding.share(built.batch.tokens))
    found = [jax.device_get(step(params, sharding.put(batch, built.batch))) for batch in batches]
    nats, tokens, counts_LE = jax.tree.map(lambda *parts: sum(np.float64(part) for part in parts), *found)
    return Tested(float(nats / tokens), int(tokens), counts_LE)


def run(config: Config, folder, recipe: str) -> dict[str, Tested]:
    """Trains to the end, or on from where the folder stands, and tests; returns the test's figures by source."""
    config = from_base(config, Path(folder))
    built = build(config, sharding.make_mesh(config.mesh))
    folder = workdir.prepare(folder, config, experiment="moe", recipe=recipe, recipes=RECIPES)
    tok = (pretrain if config.base == "random" else bases).run_tokenizer(config, folder)
    train, validation = pretrain.rows(config, tok)
    held_out = test_rows(config, tok)
    state = supervised.fit(
        built, train, validation, tok, config=config, workdir=folder, experiment="moe", recipe=recipe,
        initial=lambda: initial(config, built),
    )  # fmt: skip
    tested = {name: test(config, built, state.params, rows) for name, rows in held_out.items()}
    hosts.once(lambda: write(folder, tested))
    return tested


def write(folder: Path, tested: dict[str, Tested]) -> None:
    """Writes the test: test.md and test.html with the routers' heat map, test.json."""
    losses = [[name, f"{found.nats:.4f}", f"{found.tokens:,}"] for name, found in tested.items()]
    blocks = [Text("The test split, read once", 1), Table(["source", "loss (nats per token)", "tokens"], losses)]
    counts = {name: found.counts for name, found in tested.items() if found.counts is not None}
    for name, counts_LE in counts.items():
        blocks += [Text(f"What the routers did with {name}", 2), router_report.table(counts_LE)]
    if counts:
        router_report.heat_maps(folder / "plots" / "router.png", counts)
        blocks.append(Picture("plots/router.png", "load of the experts"))
    page.write(folder, "test", blocks)
    figures = {name: found._replace(counts=np.asarray(found.counts).tolist()) for name, found in tested.items()}
    write_whole(folder / "test.json", json.dumps({name: each._asdict() for name, each in figures.items()}))
    loss = ", ".join(f"{found.nats:.4f} on {name}" for name, found in tested.items())
    print(f"[moe] test loss {loss}; what the routers did: {folder / 'test.md'}", flush=True)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
