"""Experts over a TPU slice: memory and traffic of the train step, compiled ahead of time; needs no TPU.

    pip install -e '.[tpu]'
    python benchmarks/expert_parallel.py --topology v5p:4x4x4 --expert 16 [--model qwen3-30b-a3b] [--length 4096]

Prints one JSON object: what `experiments.moe` would run, with one row of tokens a chip, over --expert chips for the
experts and fsdp over the others. Bytes are of one chip: arguments (parameters, AdamW, batch) and peak as the compiler
reports them; of each kind of collective the sum over the step, from the compiled program's text. Of a collective the
larger of what goes in and what comes out counts (what a chip holds before a reduce-scatter, after an all-gather); its
loops count as often as they run. The loop of further rounds of `ops.exchange` is left out of the step, for no even load
enters it: what one such round in every layer would add stands by itself.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
CALLED = r"(?:calls|async_execution_computation|branch_computations)=\{?([%\w., -]+?)\}?(?:, \w+=|$)"


class Program(NamedTuple):
    """Compiled text cut up: computation -> its instructions, name -> shape, and the name of the first one run."""

    lines: dict[str, list[str]]
    shapes: dict[str, str]
    entry: str


def read(text: str) -> Program:
    """Cuts up the text of a compiled program."""
    lines, shapes, entry, here = collections.defaultdict(list), {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            here = head[2]
            entry = here if head[1] else entry
        elif made := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*)", line):
            lines[here].append(line)
            shapes[made[1]] = re.split(r" [a-z][\w-]*\(", made[2], maxsplit=1)[0]
    return Program(dict(lines), shapes, entry)


def size(shape: str) -> int:
    """Returns the bytes of a shape, a tuple's together."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shape))
    return sum(
        WIDTHS.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side) for kind, sides in arrays
    )


def trips(program: Program, condition: str, body: str) -> int | None:
    """Returns how often a loop runs; None where its bound is computed."""
    test = next(line for line in program.lines[condition] if "ROOT" in line)
    bound = [_constant(program, condition, name) for name in re.findall(r"%[\w.-]+", test.split("(", 1)[1])]
    counts = [value for value in bound if value is not None]
    if not counts:
        return None
    counter = next(re.search(r"index=(\d+)", line) for line in program.lines[condition] if "get-tuple-element" in line)
    end = next(line for line in program.lines[body] if "ROOT" in line)
    step = _step(program, body, re.findall(r"%[\w.-]+", end.split(" tuple(", 1)[1])[int(counter[1])])
    return -(-counts[0] // step)


def _constant(program: Program, where: str, name: str) -> int | None:
    found = re.compile(re.escape(name) + r" = s32\[\].* constant\((\d+)\)")
    return next((int(hit[1]) for hit in map(found.search, program.lines[where]) if hit), None)


def _step(program: Program, body: str, name: str) -> int:
    line = next((line for line in program.lines[body] if f"{name} = " in line), "")
    added = [_constant(program, body, other) for other in re.findall(r"%[\w.-]+", line.split("(", 1)[-1])]
    return next((value for value in added if value), 1)


def traffic(program: Program) -> tuple[collections.Counter, collections.Counter]:
    """Returns bytes by kind of collective: of the step, and of one run of each loop whose bound is computed."""
    step, rounds = collections.Counter(), collections.Counter()

    def walk(where: str, times: int, into: collections.Counter) -> None:
        for line in program.lines.get(where, ()):
            found = re.search(r" (" + "|".join(KINDS) + r")(?:-start)?\((.*?)\)(?:,|$)", line)
            if found:
                out = line.split(" = ", 1)[1].split(f" {found[1]}", 1)[0]
                given = sum(size(program.shapes.get(name, "")) for name in re.findall(r"%[\w.-]+", found[2]))
                made = size(out) - given if "-start(" in line else size(out)  # a start's shape holds its operands too
                into[found[1]] += times * max(given, made)
            for name, count in _calls(program, line):
                if count is None:
                    walk(name, times, rounds)
                else:
                    walk(name, times * count, into)

    walk(program.entry, 1, step)
    return step, rounds


def _calls(program: Program, line: str) -> Iterator[tuple[str, int | None]]:
    """Yields the computations that an instruction runs, and how often; None: as often as its data says."""
    if loop := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line):
        yield loop[2], trips(program, loop[1], loop[2])
        return
    for names in re.findall(CALLED, line):
        yield from ((name, 1) for name in re.findall(r"%([\w.-]+)", names))


def find_compiler() -> None:
    """Lets jax find the TPU compiler; before jax starts.

    Raises:
      SystemExit: where it is not installed.
    """
    try:
        import libtpu
    except ImportError:
        raise SystemExit("error: libtpu, the compiler for TPUs, is not installed; pip install -e '.[tpu]'") from None
    os.environ |= dict(
        TPU_LIBRARY_PATH=libtpu.get_library_path(), TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    )  # fmt: skip


def report(topology: str, model: str, expert: int, length: int, rows: int, layers: int) -> dict:
    """Compiles the step and returns its figures."""
    import jax
    from jax.experimental import topologies

    from experiments import pretrain
    from qwen_jax import config, sharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make_mesh(sharding.MeshConfig(expert=expert), devices)
    shape = config.get(model).replace(remat="full")
    shape = shape.replace(num_hidden_layers=layers) if layers else shape
    run = dataclasses.replace(
        pretrain.qwen_7b(), model=shape, length=length, batch_size=rows * len(devices), microbatches=1
    )
    built = pretrain.build(run, mesh)
    begin = time.perf_counter()
    compiled = built.train_step.lower(built.state, built.batch).compile()
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    step, rounds = traffic(read(text))
    gigabytes = lambda sums: {kind: round(sums[kind] / 1e9, 3) for kind in KINDS}
    return {
        "model": model, "layers": shape.num_hidden_layers, "topology": topology, "chips": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "rows x tokens a chip": [rows, length], "remat": shape.remat, "jax": jax.__version__,
        "GB a chip": {
            "arguments": round(memory.argument_size_in_bytes / 1e9, 3),
            "peak": round(memory.peak_memory_in_bytes / 1e9, 3),
            "temporary": round(memory.temp_size_in_bytes / 1e9, 3),
        },
        "collective GB a chip and step": gigabytes(step) | {"all": round(step.total() / 1e9, 3)},
        "more for each further round of an uneven load": gigabytes(rounds),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "seconds to compile": round(seconds),
    }  # fmt: skip


def main():
    """Prints the figures of one slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4", help="as jax names it: chip:XxYxZ")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument(
        "--expert", type=int, default=16, help="chips over which the experts are split; the rest is fsdp"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1, help="rows a chip")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has; 0: all")
    find_compiler()
    print(json.dumps(report(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
