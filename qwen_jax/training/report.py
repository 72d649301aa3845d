"""What a run leaves for its reader: curves as PNG and a short report.md, made from metrics.jsonl and config.json."""

import pathlib

from qwen_jax.files import write_whole
from qwen_jax.training import hosts, metrics, workdir


def write(folder: str | pathlib.Path, *, title: str) -> None:
    """Writes plots/loss.png and report.md into a run's folder, on the first process."""
    hosts.once(lambda: _write(pathlib.Path(folder), title))


def _write(folder: pathlib.Path, title: str) -> None:
    rows, record = metrics.read(folder), workdir.read(folder)
    plot_losses(folder / "plots" / "loss.png", {title: rows})
    losses = [row["loss"] for row in rows if "loss" in row]
    scores = [row for row in rows if "validation/loss" in row]
    lines = [f"# {title}", "", f"Started {record['started']} with `{' '.join(record['argv'][1:])}`.", ""]
    lines += ["| step | validation loss (nats per token) |", "|---|---|"]
    lines += [f"| {row['step']} | {row['validation/loss']:.4f} |" for row in scores]
    last = f"{losses[-1]:.4f}" if losses else "none was finite"
    lines += ["", f"Last training loss: {last}.", "", *speed(rows), "", "![loss](plots/loss.png)", ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".", ""]
    write_whole(folder / "report.md", "\n".join(lines))


def speed(rows: list[dict]) -> list[str]:
    """Returns the median step time, tokens/s and utilisation of the logged steps, as lines of a report."""
    steps = sorted((row for row in rows if "step_seconds" in row), key=lambda row: row["step_seconds"])
    if not steps:
        return ["No step was logged."]
    middle = steps[len(steps) // 2]
    return [
        f"Median step: {middle['step_seconds']:.3f} s, {middle['tokens_per_second']:,.0f} tokens/s, "
        f"{middle['model_flops_utilisation']:.1%} of peak (per token, forward and backward: 6 x parameters of matrix "
        "products, and causal attention)."
    ]


def plot_losses(path: pathlib.Path, runs: dict[str, list[dict]], baselines: dict[str, dict[str, float]] | None = None):
    """Draws training and validation loss of each run side by side, with horizontal lines for baselines.

    Args:
      path: the PNG to write.
      runs: title -> lines of metrics.jsonl.
      baselines: title -> {name: nats per token}.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], runs.items(), strict=True):
        for name, style in (("loss", dict(lw=1, alpha=0.7)), ("validation/loss", dict(marker="o", ms=4))):
            found = [row for row in rows if name in row]
            axis.plot(
                [row["step"] for row in found], [row[name] for row in found], label=name.replace("/", " "), **style
            )
        for (name, value), line in zip((baselines or {}).get(title, {}).items(), (":", "--"), strict=False):
            axis.axhline(value, ls=line, color="grey", label=f"{name} {value:.3f}")
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
