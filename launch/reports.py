"""The dry run's report: a dict that is its JSON, and the same as text.

    python -m launch.reports docs/results/dry_run/*.json

prints the Markdown table of reports that were written with --out.
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax

from launch import figures
from launch.changes import has, written
from launch.figures import Compiled, per_chip
from launch.hlo import KINDS
from launch.topologies import Topology
from qwen_jax.training import throughput

GB = 1e9


def versions(topology: Topology) -> dict[str, str]:
    """Returns what compiles: jax and the compiler of the topology's chips."""
    name = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[topology.of_chip.platform]
    return {"jax": jax.__version__, "compiler": f"{name} {importlib.metadata.version(name)}"}


def make(config, built, topology: Topology, compiled: dict[str, Compiled]) -> dict[str, Any]:
    """Returns the report on one config. Bytes and FLOPs are of one chip and, of train_step, one optimizer step.

    Args:
      config: the experiment's.
      built: its Program.
      topology: what it was compiled for.
      compiled: function -> what the compiler said.
    """
    chip, state = topology.of_chip, built.state
    rows, length = jax.tree.leaves(built.batch)[0].shape[:2]
    report = {
        "topology": dataclasses.asdict(topology) | {"chips": topology.chips},
        "mesh": written(config.mesh),
        "rows x tokens of a step": [rows, length],
        "microbatches": config.microbatches if has(config, "microbatches") else 1,
        "remat": config.model.remat,
        "vocabulary chunks": config.model.vocabulary_chunks,
        "bytes per chip": {
            "capacity": chip.capacity, "parameters": per_chip(state.params),
            "optimizer": per_chip(state.opt_state), "frozen": per_chip(built.frozen), "batch": per_chip(built.batch),
        },
        "functions": {name: of_function(found, chip) for name, found in compiled.items()},
        "fits": all(found.fits for found in compiled.values()),
    }  # fmt: skip
    step = report["functions"].get("train_step")
    if step and step["fits"]:
        frozen = bool(jax.tree.leaves(built.frozen))
        per_token = throughput.train_flops_per_token(config.model, length, frozen=frozen)
        report |= of_step(step["seconds"], rows * length, per_token, topology)
    return report


def of_function(found: Compiled, chip) -> dict[str, Any]:
    """Returns the report on one function."""
    peak = found.bytes["peak"]
    report: dict[str, Any] = {
        "fits": found.fits,
        "bytes": found.bytes | {"free": None if peak is None else chip.capacity - peak},
        "compile seconds": round(found.compile_seconds, 1),
    }
    if found.cost:
        cost = found.cost
        report |= {
            "FLOPs": {"products": cost.flops, **{f"{name} kernels": value for name, value in cost.kernels.items()}},
            "kernels in the program": found.kernels,
            "HBM traffic": cost.memory,
            "collective bytes": collectives(cost.collectives),
            "bytes of each round of uneven experts": collectives(cost.rounds),
            "seconds": figures.seconds(cost, chip),
        }
    return report


def collectives(moved: dict[tuple[str, str, bool], float]) -> dict[str, dict[str, float]]:
    """Returns link -> kind -> bytes."""
    found: dict[str, dict[str, float]] = {}
    for (kind, link, _), size in sorted(moved.items()):
        found.setdefault(link, {})
        found[link][kind] = found[link].get(kind, 0.0) + size
    return found


def of_step(seconds: dict[str, float], tokens: int, flops_per_token: float, topology: Topology) -> dict[str, Any]:
    """Returns what the seconds of a step mean. Of a TPU the estimate by cycles is the one that counts."""
    step = seconds.get("compiler", seconds["roofline"])
    model = flops_per_token * tokens / topology.chips
    return {
        "step seconds": step,
        "estimated by": "the compiler's cycles" if "compiler" in seconds else "roofline alone",
        "model FLOPs per chip": model,
        "model FLOPs utilisation": model / (topology.of_chip.flops * step),
        "model FLOPs utilisation, roofline": model / (topology.of_chip.flops * seconds["roofline"]),
        "tokens per second": tokens / step,
        "tokens per second and chip": tokens / step / topology.chips,
        "hours of one chip for 1B tokens": 1e9 / tokens * step * topology.chips / 3600,
    }


def priced(report: dict, options) -> dict:
    """Returns the report with the cost of 1B tokens, where a price was given."""
    if options.price > 0:
        for each in (report, *report.get("search", ()), *report.get("changes that make it fit", ())):
            if "step seconds" in each:
                each["cost of 1B tokens"] = each["hours of one chip for 1B tokens"] * options.price
    return report


def text(report: dict) -> str:
    """Returns a report as lines to read."""
    if "search" in report:
        return table(report["search"])
    chip, held = report["topology"], report["bytes per chip"]
    lines = [
        f"{report['experiment']} {report['recipe']} on {chip['name']} ({chip['slices']} x {chip['shape']}, "
        f"{chip['chips']} chips), mesh {report['mesh']}, remat {report['remat']}, "
        f"{report['microbatches']} microbatches, rows x tokens of a step {report['rows x tokens of a step']}",
        f"compiled by {report['compiler']}, jax {report['jax']}; per chip:",
        f"  state: parameters {held['parameters'] / GB:.2f} GB, optimizer {held['optimizer'] / GB:.2f} GB"
        + (f", frozen {held['frozen'] / GB:.2f} GB" if held["frozen"] else ""),
    ]
    for name, found in report["functions"].items():
        lines += _of_function(name, found, held["capacity"])
    if "step seconds" in report:
        lines += _of_step(report)
    if "changes that make it fit" in report:
        lines += ["", f"changes that make it fit ({report['changes tried']} compiled):"]
        lines += [table(report["changes that make it fit"]) if report["changes that make it fit"] else "  none found"]
    return "\n".join(lines)


def _of_function(name: str, found: dict, capacity: int) -> list[str]:
    peak, sizes = found["bytes"]["peak"], found["bytes"]
    if not found["fits"]:
        over = (
            ""
            if peak is None
            else f": needs {peak / GB:.2f} GB of {capacity / GB:.2f}, {(peak - capacity) / GB:.2f} too many"
        )
        return [f"  {name}: DOES NOT FIT{over} (compiled in {found['compile seconds']} s)"]
    moved = [
        f"{kind} {size / GB:.2f} GB" + (" between slices or nodes" if link == "dcn" else "")
        for link, kinds in found["collective bytes"].items() for kind, size in kinds.items() if kind in KINDS
    ]  # fmt: skip
    flops = ", ".join(f"{what} {value / 1e12:.1f} T" for what, value in found["FLOPs"].items())
    return [
        f"  {name}: fits, peak {peak / GB:.2f} of {capacity / GB:.2f} GB, {sizes['free'] / GB:.2f} free "
        f"(arguments {sizes['arguments'] / GB:.2f}, temporaries {sizes['temporaries'] / GB:.2f}); "
        f"compiled in {found['compile seconds']} s",
        f"    FLOPs: {flops}; HBM traffic {found['HBM traffic'] / GB:.0f} GB",
        f"    collectives: {', '.join(moved) or 'none'}",
    ]


def _of_step(report: dict) -> list[str]:
    parts = report["functions"]["train_step"]["seconds"]
    alone = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    cost = f"; 1B tokens cost {report['cost of 1B tokens']:,.0f}" if "cost of 1B tokens" in report else ""
    return [
        f"  a step takes at least {report['step seconds']:.3g} s, by {report['estimated by']} (each alone: {alone})",
        f"  model FLOPs utilisation at most {report['model FLOPs utilisation']:.1%}, "
        f"{report['tokens per second and chip']:,.0f} tokens/s a chip, "
        f"{report['hours of one chip for 1B tokens']:,.0f} chip hours for 1B tokens{cost}",
    ]


def table(reports: list[dict]) -> str:
    """Returns variations as a Markdown table, in the order given."""
    lines = ["| change | fits | peak GB | step s | utilisation | compiled in s |", "|---|---|---|---|---|---|"]
    for each in reports:
        step = each["functions"]["train_step"]
        peak = "?" if step["bytes"]["peak"] is None else f"{step['bytes']['peak'] / GB:.1f}"
        time = f"{each['step seconds']:.3g}" if each["fits"] else ""
        used = f"{each['model FLOPs utilisation']:.1%}" if each["fits"] else ""
        fits = "yes" if each["fits"] else "no"
        lines.append(f"| `{each['flags']}` | {fits} | {peak} | {time} | {used} | {step['compile seconds']} |")
    return "\n".join(lines)


def recorded(reports: list[dict]) -> str:
    """Returns reports of train steps as a Markdown table, a row each."""
    lines = [
        "| recipe | slice | mesh | rows x tokens | remat | state GB | peak GB of | step s, least | utilisation, most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in reports:
        held, step = each["bytes per chip"], each["functions"]["train_step"]
        rows, length = each["rows x tokens of a step"]
        name = f"`{each['experiment'].removeprefix('experiments.')} {each['recipe']}`"
        state = (held["parameters"] + held["optimizer"] + held["frozen"]) / GB
        peak = "?" if step["bytes"]["peak"] is None else f"{step['bytes']['peak'] / GB:.1f}"
        time = f"{each['step seconds']:.1f}" if each["fits"] else "does not fit"
        used = f"{each['model FLOPs utilisation']:.1%}" if each["fits"] else ""
        lines.append(
            f"| {name} | {each['topology']['name']} | {each['mesh']} | {rows} x {length:,} | {each['remat']} "
            f"| {state:.1f} | {peak} of {held['capacity'] / GB:.1f} | {time} | {used} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(recorded([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
