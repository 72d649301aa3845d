"""Does upcycling pay? A dense model made into experts, against going on dense, and against experts from scratch.

    python -m experiments.upcycle small --workdir runs/upcycle
    python -m experiments.upcycle smollm2 --workdir runs/upcycle-smollm2 --base $(python -m tests.parity.smollm2)

Three runs of `experiments.moe` on the same text, by the same rule of the rate, with the same FLOPs: experts made of the
base (Qwen2 report, section 2.2.2; as first published, arXiv:2212.05055, in the recipes of copies), the base itself, and
the same experts from random parameters. What the base has cost already is not counted: it is there. Without --base one
is trained first. report.md has the table and the held-out losses over FLOPs.

Expected of `small` (docs/results/upcycle), on test rows: 3.76 nats per token upcycled, 3.71 dense, 4.84 from scratch;
4.3 minutes on two cores beside the base's 3.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments import moe, pretrain
from experiments.moe import Upcycling
from qwen_jax.config import QwenConfig
from qwen_jax.training import command, metrics, pretrained, report, throughput, workdir
from qwen_jax.training.loop import LoopConfig, say
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.page import Block, Picture, Table, Text
from qwen_jax.training.samples import SamplesConfig

COPIES = Upcycling(shuffle=False, reinitialize=0.0)
NO_SAMPLES = SamplesConfig(prompts=0)


@dataclass(frozen=True)
class Config:
    """The base and the upcycled run; the other two follow from them."""

    moe: moe.Config
    dense: pretrain.Config  # how a base is made, where none is given
    base: str = ""  # Hugging Face folder or workdir of a run


def going_on(run: moe.Config) -> moe.Config:
    """Returns the run cut to 200 steps, on the text in another order than the base has read it in."""
    loop = dataclasses.replace(run.loop, steps=200, eval_every=40, checkpoint_every=40)
    return dataclasses.replace(
        run,
        loop=loop,
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=20, decay_steps=80),
        seed=1,
        validation_rows=64,
        samples=NO_SAMPLES,
    )


def small() -> Config:
    """The quickstart's model into 16 experts, 4 of a quarter of the MLP a token: equal work per token."""
    return Config(going_on(moe.small()), pretrain.small())


def small_copies() -> Config:
    """The same into 8 experts that are the whole MLP each, 2 a token: nothing is forgotten, but tokens cost more."""
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=384, norm_topk_prob=True)
    run = going_on(moe.with_experts(pretrain.small(), **experts))
    return Config(dataclasses.replace(run, upcycling=COPIES), pretrain.small())


def smollm2() -> Config:
    """SmolLM2-135M into 4 experts that are the whole MLP each, 2 a token, in every second layer; give --base."""
    run = moe.with_experts(
        pretrain.Config(
            model=QwenConfig(dtype="float32"),  # the shape is the base's
            optimizer=OptimizerConfig(peak_lr=1e-4, warmup_steps=2),
            loop=LoopConfig(steps=12, log_every=3, eval_every=6, checkpoint_every=12),
            batch_size=2, validation_rows=16, samples=NO_SAMPLES,
        ),
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1536, norm_topk_prob=True, decoder_sparse_step=2,
    )  # fmt: skip
    return Config(dataclasses.replace(run, upcycling=COPIES, test_rows=16), pretrain.small())


def smoke() -> Config:
    """Two steps each of tiny models on made-up chats: seconds, no network."""
    return Config(moe.smoke(), pretrain.smoke())


RECIPES = {"small": small, "small-copies": small_copies, "smollm2": smollm2, "smoke": smoke}


def flops_per_step(run: moe.Config) -> float:
    """Returns what a training step costs: the active parameters and attention, nothing recomputed."""
    return throughput.train_flops_per_token(run.model, run.length) * run.batch_size * run.length


def runs(config: Config, base: str) -> dict[str, moe.Config]:
    """Returns the runs; the dense one has as many steps as cost what the others' do, to the nearest, and its rate
    falls over the same share of them.
    """
    upcycled = moe.from_base(dataclasses.replace(config.moe, base=base), Path())
    dense = dataclasses.replace(upcycled, model=upcycled.model.replace(num_experts=0, num_experts_per_tok=0))
    ratio = flops_per_step(upcycled) / flops_per_step(dense)
    dense = dataclasses.replace(
        dense,
        loop=dataclasses.replace(dense.loop, steps=round(ratio * dense.loop.steps)),
        optimizer=dataclasses.replace(dense.optimizer, decay_steps=round(ratio * dense.optimizer.decay_steps)),
    )
    scratch = dataclasses.replace(upcycled, base="random", tokenizer=str(pretrained.tokenizer_path(upcycled.base)))
    return {"upcycled": upcycled, "dense": dense, "scratch": scratch}


class Result(NamedTuple):
    """What became of one run."""

    config: moe.Config
    curve: list[tuple[float, float]]  # FLOPs, held-out nats per token
    test: float  # nats per token


def run(config: Config, folder, recipe: str) -> dict[str, Result]:
    """Trains what is not trained yet, and writes the report."""
    folder = workdir.prepare(folder, config, experiment="upcycle", recipe=recipe, recipes=RECIPES)
    base = config.base or str(folder / "base")
    if not config.base:
        pretrain.run(config.dense, folder / "base", recipe)
    results = {}
    for name, of_run in runs(config, base).items():
        tested = moe.run(of_run, folder / name, recipe)
        scores = [row for row in metrics.read(folder / name) if "validation/loss" in row]
        curve = [(row["step"] * flops_per_step(of_run), row["validation/loss"]) for row in scores]
        results[name] = Result(of_run, curve, next(iter(tested.values())).nats)
    plot(results, folder / "plots" / "loss.png")
    report.summarise(folder, title=f"upcycle {recipe}", blocks=summary(results))
    say("upcycle", f"done: {folder / 'report.md'}")
    return results


def summary(results: dict[str, Result]) -> list[Block]:
    """Returns what of the report tells the losses."""
    header = ["run", "parameters", "active", "steps", "tokens", "TFLOP", "first", "last", "test"]
    rows = []
    for name, (config, curve, test) in results.items():
        counts, steps = config.model.param_counts(), config.loop.steps
        sizes = [counts["total"], counts["active"], steps, steps * config.batch_size * config.length]
        losses = [f"{loss:.4f}" for loss in (curve[0][1], curve[-1][1], test)]
        rows.append([name, *(f"{size:,}" for size in sizes), f"{curve[-1][0] / 1e12:.3g}", *losses])
    told = "Losses are nats per token: first and last on the validation rows, test on the test rows."
    return [Text(told), Table(header, rows), Picture("plots/loss.png", "held-out loss")]


def plot(results: dict[str, Result], path: Path) -> None:
    """Draws the held-out loss of each run over what it has cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        flops, nats = zip(*result.curve, strict=True)
        axes.plot([each / 1e12 for each in flops], nats, marker="o", ms=4, label=name)
    axes.set(xlabel="TFLOP of this run", ylabel="held-out nats per token")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
