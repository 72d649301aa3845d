"""What one jitted function of a recipe needs of a chip, found by compiling it: memory, work, traffic, time at best."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from launch import hlo
from launch.topologies import Chip
from qwen_jax.errors import InputError

KERNELS = 0.6  # of peak: what a kernel is taken to reach where time is reckoned by the compiler's cycles


class Compiled(NamedTuple):
    """One function, compiled for a topology.

    Attributes:
      fits: whether a chip's memory holds it.
      bytes: of a chip: arguments, outputs, aliased (outputs that take an argument's place), temporaries, peak; only
        peak where the compiler refused. None where it said nothing.
      cost: what a chip does in one run; None where it does not fit.
      compile_seconds: here.
      kernels: how many kernels of ours the program calls.
    """

    fits: bool
    bytes: dict[str, int | None]
    cost: hlo.Cost | None
    compile_seconds: float
    kernels: int = 0


def compile_function(function, arguments, chip: Chip, keep: Path | None = None) -> Compiled:
    """Compiles a jitted function for the devices that its abstract arguments lie on.

    Args:
      function: of a Program.
      arguments: structs with shardings.
      chip: that the devices are.
      keep: where `read` shall find what the compiler made: PATH.hlo.txt and PATH.json are written.
    """
    start = time.perf_counter()
    try:
        compiled = function.trace(*arguments).lower(lowering_platforms=(chip.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(False, {"peak": needed(str(error))}, None, time.perf_counter() - start)
    seconds, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    sizes = {name: getattr(memory, f"{part}_size_in_bytes") for name, part in names.items()}
    sizes["peak"] = memory.peak_memory_in_bytes
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.with_suffix(".hlo.txt").write_text(text)
        keep.with_suffix(".json").write_text(json.dumps({"bytes": sizes, "compile seconds": seconds}) + "\n")
    return _counted(text, sizes, seconds, chip)


def read(kept: Path, chip: Chip) -> Compiled:
    """Returns what `compile_function` kept.

    Raises:
      InputError: where it is not there: nothing was kept, or the program did not fit.
    """
    if not kept.with_suffix(".json").exists():
        raise InputError(f"{kept.with_suffix('.json')} is missing; expected what --keep leaves of a program that fits")
    found = json.loads(kept.with_suffix(".json").read_text())
    return _counted(kept.with_suffix(".hlo.txt").read_text(), found["bytes"], found["compile seconds"], chip)


def _counted(text: str, sizes: dict[str, int], seconds: float, chip: Chip) -> Compiled:
    cost = hlo.cost(text, chip.per_host if chip.platform == "cuda" else 0)
    count = len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"', text))
    return Compiled(sizes["peak"] <= chip.capacity, sizes, cost, seconds, count)


def needed(message: str) -> int | None:
    """Returns the bytes that a program would have needed, from what the TPU compiler says when it refuses one."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return int(float(found[1]) * units[found[2]]) if found else None


def seconds(cost: hlo.Cost, chip: Chip) -> dict[str, float]:
    """Returns the seconds of one run, part by part, were each part alone; and two estimates of the whole.

    "roofline" is max(products, memory) and what collectives cannot hide behind that: those that the program waits for,
    and of the others what takes longer than the work. "compiler" (TPU) takes the work by the compiler's own cycles,
    kernels at KERNELS of peak. Both take every link of a chip as busy: bounds from below, no predictions.
    """
    kernels = sum(cost.kernels.values())
    moved = {(link, hides): 0.0 for link in ("ici", "dcn") for hides in (False, True)}
    for (kind, link, hides), size in cost.collectives.items():
        twice = 2 if kind == "all-reduce" else 1  # out to be summed, and back
        moved[link, hides] += twice * size / (chip.ici if link == "ici" else chip.dcn)
    products, memory = (cost.flops + kernels) / chip.flops, cost.memory / chip.memory
    waited = sum(value for (_, hides), value in moved.items() if not hides)
    hidden = max(moved["ici", True], moved["dcn", True])
    whole = lambda work: work + waited + max(0.0, hidden - work)
    found = {
        "products": products, "memory": memory, "ici": moved["ici", True] + moved["ici", False],
        "dcn": moved["dcn", True] + moved["dcn", False], "roofline": whole(max(products, memory)),
    }  # fmt: skip
    if chip.clock:
        found["cycles"] = cost.cycles / chip.clock
        found["compiler"] = whole(found["cycles"] + kernels / (KERNELS * chip.flops))
    return found


def per_chip(tree: Any) -> int:
    """Returns the bytes that one chip holds of a tree of structs with shardings."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(size(x) for x in jax.tree.leaves(tree))
