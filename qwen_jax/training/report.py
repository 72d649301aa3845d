"""What a run leaves for its reader: report.md, and report.html with its picture inside.

Made from what the run wrote: config.json, metrics.jsonl, accounts.json, samples/.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwen_jax.errors import InputError
from qwen_jax.training import accounts, hosts, metrics, page, samples, workdir
from qwen_jax.training.page import Block, Code, Picture, Table, Text

MOST_ROWS = 24  # of the table of evaluations; the curve has them all
MOST_TEXT = 500  # characters of a sample; the files have them all


class Budget(NamedTuple):
    """What a whole run on rows reads.

    Attributes:
      rows, length: how many rows, of how many tokens.
      padding: share of the places in a row that hold no token.
      epochs: how often each part of the training data is read.
    """

    rows: int
    length: int
    padding: float
    epochs: list[float]


def write(
    folder: str | pathlib.Path,
    *,
    title: str,
    budget: Budget | None = None,
    unit: str = "nats per learned token",
    more: Sequence[Block] = (),
) -> None:
    """Writes plots/loss.png, report.md and report.html into a run's folder, on the first process.

    Args:
      folder: the run's.
      title: of the page.
      budget: what the run read.
      unit: of its losses.
      more: what an experiment has to say besides; stands before the losses.

    Raises:
      InputError: where they cannot be written.
    """
    _on_the_first(folder, lambda: _write(pathlib.Path(folder), title, budget, unit, more))


def _write(folder: pathlib.Path, title: str, budget: Budget | None, unit: str, more: Sequence[Block]) -> None:
    rows, record, books = metrics.read(folder), workdir.read(folder), accounts.read(folder)
    plot_losses(folder / "plots" / "loss.png", {title: rows}, unit=unit)
    blocks = [*head(title, record, books), *differences(record), *more, *curves(rows, unit), *speed(rows, books)]
    if books:
        blocks += [*tokens(budget, books), *time_and_memory(books)]
    blocks += [*compared(samples.read(folder)), *versions(record)]
    page.write(folder, "report", blocks)


def summarise(folder: pathlib.Path, *, title: str, blocks: Sequence[Block]) -> None:
    """Writes and prints report.md of an experiment that has no curve of its own, on the first process.

    Args:
      folder: from `workdir.prepare`.
      title: of the page.
      blocks: what was found; stands between what was run and with what.

    Raises:
      InputError: where it cannot be written.
    """

    def whole():
        record = workdir.read(folder)
        page.write(folder, "report", [*head(title, record), *blocks, *differences(record), *versions(record)])
        print((folder / "report.md").read_text())

    _on_the_first(folder, whole)


def _on_the_first(folder: str | pathlib.Path, function: Callable[[], None]) -> None:
    def told():
        try:
            function()
        except OSError as error:
            raise InputError(f"the report in {folder} cannot be written: {error.strerror or error}") from None

    hosts.once(told)


def head(title: str, record: dict, books: accounts.Accounts | None = None) -> list[Block]:
    """What was run, and when."""
    times = f", in {books.starts} starts" if books and books.starts > 1 else ""
    argv = " ".join(record["argv"][1:])
    return [Text(title, 1), Text(f"Begun {record['started']}{times}, last with these words:"), Code(argv)]


def differences(record: dict) -> list[Block]:
    """What differs from the recipe that was named."""
    changed = record.get("changed")
    title = Text("What differs from the recipe", 2)
    if changed is None:
        return [title, Text(f"Nothing is known: {record['recipe']!r} is a recipe of another experiment.")]
    if not changed:
        return [title, Text(f"Nothing: this is {record['recipe']!r} as it stands.")]
    rows = [[f"--{name.replace('_', '-')}", *map(str, both)] for name, both in changed.items()]
    return [title, Table(["flag", f"recipe {record['recipe']}", "this run"], rows)]


def domains(rows: list[dict]) -> list[str]:
    """Names of the domains that were evaluated apart."""
    names = (name for row in rows for name in row if name.startswith("validation/") and name.endswith("/loss"))
    inner = (name.removeprefix("validation/").removesuffix("/loss") for name in names if name.count("/") > 1)
    return list(dict.fromkeys(inner))


def curves(rows: list[dict], unit: str) -> list[Block]:
    """Losses, as a picture and as a table of the evaluations."""
    losses = [row["loss"] for row in rows if "loss" in row]
    scores = [row for row in rows if "validation/loss" in row]
    last = f"{losses[-1]:.4f}" if losses else "none was finite"
    blocks = [Text("Losses", 2), Text(f"Last training loss: {last}. All losses are {unit}.")]
    blocks.append(Picture("plots/loss.png", "loss"))
    if not scores:
        return blocks
    best = min(scores, key=lambda row: row["validation/loss"])
    names = ["validation/loss", "validation/perplexity", *(f"validation/{name}/loss" for name in domains(rows))]
    stride = -(-len(scores) // MOST_ROWS)
    shown = [row for place, row in enumerate(scores) if place % stride == 0 or row in (best, scores[-1])]
    header = ["step", "validation loss", "perplexity", *(f"{name} loss" for name in domains(rows))]
    table = [[str(row["step"]), *(f"{row[name]:.4f}" if name in row else "" for name in names)] for row in shown]
    told = (
        f"Validation loss: {scores[0]['validation/loss']:.4f} at step {scores[0]['step']}, "
        f"{scores[-1]['validation/loss']:.4f} at step {scores[-1]['step']}, lowest {best['validation/loss']:.4f} at "
        f"step {best['step']}."
    )
    return [*blocks, Text(told), Table(header, table)]


def speed(rows: list[dict], books: accounts.Accounts | None) -> list[Block]:
    """Tokens/s and utilisation, with their formulas."""
    blocks = [Text("Speed", 2), Text(median_step(rows))]
    if books:
        blocks.append(
            Text(
                "Tokens/s are those of the batch, padding included, over the time from step to step, without "
                "evaluations and checkpoints. Utilisation is tokens/s x FLOPs per token / peak: "
                f"{books.flops_per_token:.4g} FLOPs per token (6 per parameter of a matrix product, 4 where it is "
                "frozen, and 12 x layers x heads x head_dim x length / 2 for causal attention; nothing recomputed), "
                f"peak {books.peak_flops:.4g} FLOP/s ({books.peak_source})."
            )
        )
    return blocks


def median_step(rows: list[dict]) -> str:
    """Returns the median step time, tokens/s and utilisation of the logged steps, as a sentence."""
    steps = sorted((row for row in rows if "step_seconds" in row), key=lambda row: row["step_seconds"])
    if not steps:
        return "No step was logged."
    middle = steps[len(steps) // 2]
    return (
        f"Median step: {middle['step_seconds']:.3f} s, {middle['tokens_per_second']:,.0f} tokens/s, "
        f"{middle['model_flops_utilisation']:.1%} of peak."
    )


def tokens(budget: Budget | None, books: accounts.Accounts) -> list[Block]:
    """What was read, and how much of it was learned."""
    if budget is None:
        return []
    places = budget.rows * budget.length
    lines = [
        ["rows", f"{budget.rows:,} of {budget.length:,} tokens"],
        ["places", f"{places:,}"],
        ["padding", f"{budget.padding:.2%} of places"],
        ["tokens read", f"{places * (1 - budget.padding):,.0f}"],
        ["learned tokens (targets in the loss)", f"{books.weight:,.0f}, {books.weight / places:.1%} of places"],
        ["epochs", ", ".join(f"{epochs:.2f}" for epochs in budget.epochs)],
    ]
    return [Text("Token budget", 2), Table(["what", "how much"], lines)]


def time_and_memory(books: accounts.Accounts) -> list[Block]:
    """Where the time and the memory went."""
    whole = sum(books.seconds.values())
    order = sorted(books.seconds.items(), key=lambda item: -item[1])
    spent = [[name, f"{seconds:,.1f}", f"{seconds / whole:.1%}"] for name, seconds in order]
    memory = dict(books.memory)
    host, device = memory.pop("host_peak", None), memory.pop("device_peak", None)
    lines = [[f"the train step's {name}, each device", _gigabytes(size)] for name, size in memory.items()]
    if memory:
        peak = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
        lines.append(["the train step, each device (arguments + outputs - aliased + temporaries)", _gigabytes(peak)])
    lines += [["peak in use on a device", _gigabytes(device)]] if device else []
    lines += [["peak resident on the first host", _gigabytes(host)]] if host else []
    return [
        Text("Where the time and the memory went", 2),
        Text(
            f"{whole:,.1f} s of wall time in the loop. `step` is the wait for the device, `data` the wait for batches, "
            "`first samples` holds their compilation."
        ),
        Table(["time", "s", "share"], [*spent, ["all", f"{whole:,.1f}", "100%"]]),
        Table(["memory", "GB"], lines),
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}"


def compared(kept: dict[int, list[dict]]) -> list[Block]:
    """Samples of the first and the last time, side by side; those that were judged stand with their rewards."""
    if not kept or "reward" in kept[min(kept)][0]:
        return []
    first, last = min(kept), max(kept)
    rows = [
        [old["domain"], f"… {old['prompt'][-MOST_TEXT:]}" if len(old["prompt"]) > MOST_TEXT else old["prompt"]]
        + [text[:MOST_TEXT] for text in (old["reference"], old["completion"], new["completion"])]
        for old, new in zip(kept[first], kept[last], strict=False)
    ]
    return [
        Text("Samples", 2),
        Text(f"Held-out prompts, continued with the likeliest token each time; all steps are in {samples.FOLDER}/."),
        Table(["domain", "prompt", "the data's answer", f"step {first}", f"step {last}"], rows),
    ]


def versions(record: dict) -> list[Block]:
    """What it ran with."""
    listed = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [Text("Versions", 2), Text(f"{listed}; this code: {record['git'] or 'not from a git checkout'}.")]


def plot_losses(
    path: pathlib.Path,
    runs: dict[str, list[dict]],
    baselines: dict[str, dict[str, float]] | None = None,
    unit: str = "nats per token",
):
    """Draws training and validation loss of each run side by side, with horizontal lines for baselines.

    Args:
      path: the PNG to write.
      runs: title -> lines of metrics.jsonl.
      baselines: title -> {name: loss}.
      unit: of the losses.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], runs.items(), strict=True):
        styles = {"loss": dict(lw=1, alpha=0.7), "validation/loss": dict(marker="o", ms=4)}
        styles |= {f"validation/{name}/loss": dict(lw=1, ls="--") for name in domains(rows)}
        for name, style in styles.items():
            found = [row for row in rows if name in row]
            axis.plot(
                [row["step"] for row in found], [row[name] for row in found], label=name.replace("/", " "), **style
            )
        for (name, value), line in zip((baselines or {}).get(title, {}).items(), (":", "--"), strict=False):
            axis.axhline(value, ls=line, color="grey", label=f"{name} {value:.3f}")
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
