"""What reinforcement learning made of a policy: held-out answers by step, and the curves of its rollouts."""

import pathlib

from qwen_jax.eval import own_answers
from qwen_jax.training import hosts, metrics, samples
from qwen_jax.training.page import Block, Picture, Table, Text

PLOT = "plots/rewards.png"
MOST_ROWS = 12
WATCHED = (
    *("rollout/reward", "rollout/kl", "rollout/entropy", "rollout/length", "rollout/gap_max"),
    *("policy/clip_fraction", "policy/ratio_max", "policy/ratio_min", "policy/first_ratio_gap"),
    *("value/clip_fraction", "value/explained_variance"),
)
CURVES = {
    "rollout/reward": ("reward", "reward"),
    "rollout/kl": ("KL from the reference, nats an answer", "kl"),
    "rollout/entropy": ("entropy, nats a token", "entropy"),
    "rollout/length": ("tokens an answer", "length"),
}  # metric -> title, and the name among `own_answers.figures`


def write(folder: pathlib.Path) -> list[Block]:
    """Writes plots/rewards.png into a run's folder; returns what its report shows besides the curves of the loss."""
    rows = [row for row in metrics.read(folder) if "rollout/reward" in row]
    kept = {step: some for step, some in samples.read(folder).items() if "kl" in some[0]}
    found = {step: own_answers.figures(some) for step, some in kept.items()}
    hosts.once(lambda: plot(folder / PLOT, rows, found))
    picture = Picture(PLOT, "rollouts by step, and held-out reward against KL")
    return [*own_answers.blocks(kept), *rollouts(rows), picture]


def before_and_after(folder: pathlib.Path) -> list[Block]:
    """Returns in a sentence what a run's folder holds of held-out prompts, and a table of some answers."""
    kept = samples.read(folder)
    first, last = min(kept), max(kept)
    before, after = own_answers.figures(kept[first]), own_answers.figures(kept[last])
    told = lambda found: f"{found['reward']:.3f} ± {found['reward_error']:.3f}"
    text = (
        f"The reward of {len(kept[last])} answers to held-out prompts was {told(before)} before and is {told(after)} "
        f"after {last} steps, {after['kl']:.1f} nats an answer from the model before (± is the standard error). "
        f"There is a whole report.md in {folder.name}/."
    )
    return [Text(text), *own_answers.before_and_after(kept[first], kept[last], steps=(first, last))]


def rollouts(rows: list[dict]) -> list[Block]:
    """What the lines of metrics.jsonl tell about rollouts and updates, at most MOST_ROWS of them."""
    stride = -(-len(rows) // MOST_ROWS) or 1
    some = [row for place, row in enumerate(rows) if place % stride == 0 or row is rows[-1]]
    names = [name for name in WATCHED if any(name in row for row in some)]
    table = [[str(row["step"]), *(f"{row[name]:.4g}" if name in row else "" for name in names)] for row in some]
    return [Text("Rollouts and updates", 2), Table(["step", *names], table)]


def plot(path: pathlib.Path, rows: list[dict], kept: dict[int, dict[str, float]]) -> None:
    """Draws the rollouts' curves, and the held-out reward of each evaluation against its KL.

    Args:
      path: the PNG to write.
      rows: lines of metrics.jsonl that have a reward.
      kept: step -> `own_answers.figures`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES) + 1, figsize=(4 * (len(CURVES) + 1), 3.5), layout="constrained")
    for axis, (name, (title, held_out)) in zip(axes, CURVES.items(), strict=False):
        found = [row for row in rows if name in row]
        axis.plot([row["step"] for row in found], [row[name] for row in found], lw=1, label="rollouts")
        axis.plot(list(kept), [found[held_out] for found in kept.values()], "o--", ms=4, label="held out")
        axis.set(title=title, xlabel="step")
        axis.legend()
    kl, reward, error = ([found[name] for found in kept.values()] for name in ("kl", "reward", "reward_error"))
    axes[-1].errorbar(kl, reward, yerr=error, marker="o", capsize=3)
    for step, x, y in zip(kept, kl, reward, strict=True):
        axes[-1].annotate(str(step), (x, y))
    axes[-1].set(title="held-out reward against KL", xlabel="KL(policy | reference), nats an answer")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
