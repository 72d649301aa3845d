"""Reward against KL of several ways to align a model: PPO, GRPO, DPO, online DPO and best-of-n, on one task.

    python -m experiments.ablations.frontier runs --workdir runs/frontier \\
        --runs ppo=runs/ppo0,runs/ppo1,runs/ppo2 dpo=runs/dpo0,runs/dpo1,runs/dpo2 best-of-n=runs/best0,runs/best1

Reads the folders of runs that are finished, one for each seed: the judged samples of PPO, GRPO, DPO and online DPO by
step, those of best-of-n by n, whose KL is its bound log n - (n - 1) / n (arXiv:2401.01879, theorem 1). They
are comparable where the answers are to the same prompts and judged by the same reward model, from the same model to
begin with: runs on other prompts are refused, and so are runs whose untrained policies differ by more than chance.
(`ppo small` goes on from first words, which the others are not given: --begin 0; `best_of_n`: --split validation.)
Figures are means over seeds, ± the standard deviation between them. Seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.eval import own_answers, policies
from qwen_jax.files import write_whole
from qwen_jax.training import command, hosts, report, samples, workdir
from qwen_jax.training.loop import say
from qwen_jax.training.page import Block, Picture, Table, Text

CHANCE = 5.0  # standard errors that the rewards of two untrained policies may be apart


@dataclass(frozen=True)
class Config:
    """What is drawn."""

    runs: tuple[str, ...] = ()  # NAME=DIR,DIR,...: a method, and a folder for each seed
    made_up: int = 0  # so many seeds of two methods that were never run, first: a smoke


def runs() -> Config:
    """The runs that --runs names."""
    return Config()


def smoke() -> Config:
    """Made-up figures of two methods and two seeds: seconds."""
    return Config(made_up=2)


RECIPES = {"runs": runs, "smoke": smoke}


class Point(NamedTuple):
    """A policy: after `place` steps, or the best of `place` answers."""

    place: int
    kl: float
    reward: float
    wins: float | None  # share of its answers that beat the untrained policy's; None where nobody counted


class Run(NamedTuple):
    """The points of a run, by place; its first answers' mean reward, the error of that, and the prompts they are to."""

    points: list[Point]
    first: tuple[float, float]
    prompts: frozenset[str]


def run(config: Config, folder, recipe: str) -> dict[str, list[Run]]:
    """Reads, draws, and writes the report; returns the runs of each method."""
    folder = workdir.prepare(folder, config, experiment="ablations.frontier", recipe=recipe, recipes=RECIPES)
    named = parse(config.runs) | (made_up(folder, config.made_up) if config.made_up else {})
    if not named:
        raise InputError("--runs is missing; expected NAME=DIR,DIR,... of each method")
    found = {name: [read(path) for path in paths] for name, paths in named.items()}
    check(found, named)
    hosts.once(lambda: plot(folder / "plots" / "frontier.png", found))
    report.summarise(folder, title=f"frontier {recipe}", blocks=summary(found, named))
    say("frontier", f"done: {folder / 'report.md'}")
    return found


def parse(named: tuple[str, ...]) -> dict[str, list[Path]]:
    """Returns method -> folders; raises InputError where a word does not say both, or a method is named twice."""
    found: dict[str, list[Path]] = {}
    for word in named:
        name, _, paths = word.partition("=")
        if not name or not paths or name in found:
            raise InputError(f"--runs has {word!r}; expected NAME=DIR,DIR,..., each name once")
        found[name] = [Path(path) for path in paths.split(",")]
    return found


def read(folder: Path) -> Run:
    """Returns the points of a finished run; raises InputError where it has no judged samples."""
    kept = {step: some for step, some in samples.read(folder).items() if some and {"reward", "kl"} <= some[0].keys()}
    if not kept:
        raise InputError(f"{folder} has no judged samples; expected a run whose answers a reward model has scored")
    first = kept[min(kept)]
    rewards = [sample["reward"] for sample in first]
    if workdir.read(folder)["experiment"] == "best_of_n":
        groups: dict[str, list[float]] = {}
        for sample in first:
            groups.setdefault(sample["prompt"], []).append(sample["reward"])
        points = [Point(f["n"], f["kl_bound"], f["reward"], None) for f in policies.by_n(list(groups.values()))]
    else:
        won = lambda some: own_answers.win_rate([sample["reward"] for sample in some], rewards).share
        by_step = {step: own_answers.figures(some) for step, some in kept.items()}
        points = [Point(step, f["kl"], f["reward"], won(kept[step])) for step, f in by_step.items()]
    figures = own_answers.figures(first)
    return Run(points, (figures["reward"], figures["reward_error"]), frozenset(sample["prompt"] for sample in first))


def check(found: dict[str, list[Run]], named: dict[str, list[Path]]) -> None:
    """Raises InputError where runs cannot be compared."""
    every = [both for name in found for both in zip(found[name], named[name], strict=True)]
    (one, path), others = every[0], every[1:]
    for other, where in others:
        if other.prompts != one.prompts:
            raise InputError(f"{where} answers other prompts than {path}; expected runs on the same held-out prompts")
        (a, a_error), (b, b_error) = one.first, other.first
        if abs(a - b) > CHANCE * np.hypot(a_error, b_error) + 1e-6:
            raise InputError(
                f"{where} begins at a reward of {b:.3f}, {path} at {a:.3f}: expected the same untrained policy and "
                "reward model"
            )


def over_seeds(some: list[Run]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Returns (place, mean, standard deviation) of (kl, reward, wins) over runs, at the places that all have."""
    by_place = [{point.place: point for point in one.points} for one in some]
    rows = []
    for place in sorted(set.intersection(*map(set, by_place))):
        values = np.array([points[place][1:] for points in by_place], np.float64)  # None becomes nan
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(3)
        rows.append((place, values.mean(axis=0), spread))
    return rows


def summary(found: dict[str, list[Run]], named: dict[str, list[Path]]) -> list[Block]:
    """Returns what the report tells."""
    rows = []
    for name, some in found.items():
        for place, mean, spread in over_seeds(some):
            kl, reward, wins = (f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
            rows.append([name, str(len(some)), str(place), kl, reward, "" if np.isnan(mean[2]) else wins])
    first = next(iter(found.values()))[0]
    listed = "; ".join(f"{name}: {', '.join(map(str, paths))}" for name, paths in named.items())
    return [
        Text(
            f"Answers to {len(first.prompts)} held-out prompts. Mean over seeds ± the standard deviation between them. "
            "KL is in nats an answer; that of best-of-n is its bound. A place is a step, or an n."
        ),
        Table(["method", "seeds", "place", "KL", "reward", "wins against the untrained policy"], rows),
        Picture("plots/frontier.png", "reward against KL"),
        Text(f"Runs: {listed}."),
    ]


def plot(path: Path, found: dict[str, list[Run]]) -> None:
    """Draws each method's mean with its spread, and its runs as thin lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for place, (name, some) in enumerate(found.items()):
        color = f"C{place}"
        for one in some:
            axes.plot([p.kl for p in one.points], [p.reward for p in one.points], color=color, lw=0.7, alpha=0.4)
        _, mean, spread = zip(*over_seeds(some), strict=True)
        (kl, reward, _), (kl_spread, reward_spread, _) = np.transpose(mean), np.transpose(spread)
        style = dict(marker="o", ms=4, capsize=2, color=color, label=f"{name}, {len(some)} seeds")
        axes.errorbar(kl, reward, xerr=kl_spread, yerr=reward_spread, **style)
    axes.set(xlabel="KL from the untrained policy, nats an answer", ylabel="mean reward")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def made_up(folder: Path, seeds: int) -> dict[str, list[Path]]:
    """Writes folders of runs that never were; returns them by method."""
    found = {"made-up": [folder / f"made_up{seed}" for seed in range(seeds)],
             "made-up best-of-n": [folder / f"made_up_best{seed}" for seed in range(seeds)]}  # fmt: skip
    for name, paths in found.items():
        for seed, path in enumerate(paths):
            path.mkdir(parents=True, exist_ok=True)
            record = dict(experiment="best_of_n" if "best" in name else "dpo", recipe="made-up", config={}, started="")
            hosts.once(lambda path=path, record=record: write_whole(path / "config.json", json.dumps(record)))
            for step in (0,) if "best" in name else (0, 10, 20):
                draw = np.random.default_rng([seed, step])
                rewards = draw.normal(step / 20, 1, 32).tolist()
                some = [dict(prompt=f"p{place % 2}", ids=[place % 5, 1], kl=step / 10, reward=reward, finished=True)
                        for place, reward in enumerate(rewards)]  # fmt: skip
                samples.write(path, step, some)
    return found


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
