"""What a compiled program does in one run, read from its text: FLOPs, bytes of memory, bytes of each collective.

The compiler's own `cost_analysis` counts every loop's body once; here loops count as often as they run. A loop whose
bound is computed at run time is left out of the step and stands by itself. Reads the text of XLA for TPU and for GPU.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from launch import kernels

KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "partition-id", "replica-id", "after-all", "optimization-barrier", "copy-done", "slice-done", "async-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done", "recv",
}  # fmt: skip
CALLED = re.compile(r"(?:calls|async_execution_computation|to_apply)=%([\w.-]+)")
BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.-]+))")


class Instruction(NamedTuple):
    """One line: `%name = shape op(%operand, ...), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str


class Cost(NamedTuple):
    """Of one device. `collectives` and `rounds` map (kind, "ici" or "dcn", whether it may hide behind work) to bytes.

    Of a collective the larger of what goes in and what comes out counts: what a chip holds before a reduce-scatter,
    after an all-gather.

    Attributes:
      flops: of matrix products outside kernels.
      kernels: FLOPs inside kernels, by kind: see `launch.kernels`.
      memory: bytes read from and written to HBM.
      cycles: the TPU compiler's own estimate for all but collectives and kernels; 0 of a GPU.
      collectives: bytes.
      rounds: the collectives of one run of each loop whose bound is computed at run time.
    """

    flops: float
    kernels: dict[str, float]
    memory: float
    cycles: float
    collectives: dict[tuple[str, str, bool], float]
    rounds: dict[tuple[str, str, bool], float]


def cost(text: str, devices_per_host: int = 0) -> Cost:
    """Returns what a device does in one run.

    Args:
      text: of a compiled program.
      devices_per_host: collectives of devices that are further apart count as "dcn"; 0 for TPUs, whose compiler makes
        transfers between slices operations of their own.
    """
    step, rounds = Program(text, devices_per_host).of_computation()
    part = lambda kind, of=step: {key[1:]: value for key, value in of.items() if key[0] == kind}
    return Cost(
        step["flops",], {name: value for (name,), value in part("kernel").items()}, step["memory",], step["cycles",],
        part("collective"), part("collective", rounds),
    )  # fmt: skip


class Program:
    """A compiled program's text, cut up."""

    def __init__(self, text: str, devices_per_host: int = 0):
        self.lines: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.shapes: dict[str, str] = {}
        self.found: dict[str, tuple[collections.Counter, collections.Counter]] = {}
        self.entry, self.devices_per_host, here = "", devices_per_host, ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                here = head[2]
                self.entry = here if head[1] else self.entry
            elif made := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)", line):
                self.shapes[made[1]] = made[2]
                operands = tuple(re.findall(r"%[\w.-]+", made[4]))
                self.lines[here].append(Instruction(made[1], made[2], made[3], operands, line))

    def of_computation(self, where: str = "") -> tuple[collections.Counter, collections.Counter]:
        """Returns what one run of a computation costs, and what its loops of unknown length add."""
        if where not in self.found:
            self.found[where] = self._count(where)
        return self.found[where]

    def _count(self, where: str):
        step, rounds, seen = collections.Counter(), collections.Counter(), {}
        for depth, each, inside in self._with_fused(where or self.entry):
            if not depth:
                step["cycles",] += int((re.search(r'"estimated_cycles":"?(\d+)', each.line) or (0, 0))[1])
                step["memory",] += self._memory(each)
                for more, times in self._loops(each):
                    inner = self.of_computation(more)
                    for into, found in ((step if times else rounds, inner[0]), (rounds, inner[1])):
                        into.update({key: value * (times or 1) for key, value in found.items()})
            if each.op in ("dot", "convolution"):
                step["flops",] += self._product(each)
            elif each.op == "custom-call":
                step.update(self._kernel(each))
            elif moved := self._collective(each, inside):
                seen.setdefault(moved[0], []).append(moved[1:])
        for found in seen.values():  # the start, the middle and the end of an asynchronous one are of one chain
            kind, link, size, hides = found[0]
            step["collective", kind, link, hides or len(found) > 1] += size
        return step, rounds

    def _with_fused(self, where: str, depth: int = 0) -> Iterator[tuple[int, Instruction, str]]:
        """Yields all instructions that run with a computation but those of loops: depth of fusion, it, and in what."""
        for each in self.lines.get(where, ()):
            yield depth, each, where
            if each.op in ("fusion", "call", "async-start"):
                inner = depth + (each.op == "fusion")
                for name in CALLED.findall(each.line):
                    yield from self._with_fused(name, inner)

    def _loops(self, each: Instruction) -> Iterator[tuple[str, int | None]]:
        """Yields the computations that an instruction runs, and how often; None: as often as its data says."""
        if each.op == "while":
            condition, body = (re.search(rf"{name}=%([\w.-]+)", each.line)[1] for name in ("condition", "body"))
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', each.line)
            yield body, int(known[1]) if known else trips(self, condition, body)
        elif each.op == "conditional":  # the dearest branch
            names = [name.strip(" %") for found in BRANCHES.findall(each.line) for name in "".join(found).split(",")]
            weight = lambda name: sum(self.of_computation(name)[0].values())
            yield max(names, key=weight), 1

    def _product(self, each: Instruction) -> float:
        """Returns the FLOPs of a dot, or of a convolution, which is what dots are on a TPU."""
        made, left, right = (sides(self.shapes[name]) for name in (each.name, *each.operands[:2]))
        if each.op == "dot":
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.line)[1]
            return 2.0 * math.prod(made) * math.prod(left[int(axis)] for axis in over.split(",") if axis)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.line)
        total = 2.0 * made[labels[3].index("b")] * made[labels[3].index("f")] * right[labels[2].index("i")]
        window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", each.line) or ("", ""))[1]))
        for axis in (label for label in labels[3] if label.isdigit()):
            side = lambda name, default, axis=axis: window.get(name, "x".join([default] * 9)).split("x")[int(axis)]
            total *= _pairs(
                left[labels[1].index(axis)], right[labels[2].index(axis)], made[labels[3].index(axis)],
                *(int(side(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")),
                int(side("pad", "0_0").split("_")[0]),
            )  # fmt: skip
        return total / int((re.search(r"batch_group_count=(\d+)", each.line) or (1, 1))[1])

    def _kernel(self, each: Instruction) -> dict[tuple[str, str], float]:
        if not re.search(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"', each.line):
            return {}
        inputs = [(dtype(self.shapes[name]), sides(self.shapes[name])) for name in each.operands]
        outputs = [(kind, _numbers(found)) for kind, found in arrays(each.shape)]
        kind, flops = kernels.flops(inputs, outputs)
        return {("kernel", kind): flops}

    def _collective(self, each: Instruction, inside: str) -> tuple[str, str, str, float, bool] | None:
        """Returns chain, kind, link, bytes, and whether it may hide behind work; None of anything else."""
        if each.op == "send" and "_xla_megascale" in each.line:
            kind = re.search(r'transfer_type="(\w+)"', each.line)[1].lower().replace("_", "-")
            return each.name, kind, "dcn", size(self.shapes[each.operands[0]]), True
        kind, starts = each.op.removesuffix("-start"), each.op.endswith("-start")
        if kind not in KINDS:
            return None
        if inside.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter is written as an all-reduce and a slice
            kind = "reduce-scatter"
        given, made = sum(size(self.shapes.get(name, "")) for name in each.operands), size(each.shape)
        if starts and each.shape.startswith("("):
            made -= given  # a start's shape holds its operands too
        chain = (re.search(r'chain_id="(\d+)"', each.line) or ("", each.name))[1]
        return chain, kind, self._link(each.line), float(max(given, made)), starts

    def _link(self, line: str) -> str:
        """Returns whether a collective stays within what is wired directly."""
        if not self.devices_per_host:
            return "ici"
        return "dcn" if any(len({i // self.devices_per_host for i in ids}) > 1 for ids in groups(line)) else "ici"

    def _memory(self, each: Instruction) -> float:
        """Returns the bytes of HBM that an instruction reads and writes; what it slices counts as the slice."""
        if each.op in MOVES_NOTHING:
            return 0.0
        if each.op in ("copy-start", "slice-start"):
            return (
                float(sum(in_hbm(text) for text in _parts(each.shape)[:2]))
                if each.op == "copy-start"
                else float(2 * size(_parts(each.shape)[1]))
            )
        if each.op == "dynamic-slice":
            return float(in_hbm(each.shape) * 2)
        if each.op == "dynamic-update-slice":
            return float(size(self.shapes[each.operands[1]]) * 2)
        read = [in_hbm(self.shapes.get(name, "")) for name in each.operands]
        written = in_hbm(each.shape)
        if each.op == "fusion" and (called := CALLED.search(each.line)):
            read, written = self._fused_memory(called[1], read, written)
        return float(sum(read) + written)

    def _fused_memory(self, where: str, read: list[int], written: int) -> tuple[list[int], int]:
        inside = self.lines.get(where, ())
        users = collections.defaultdict(list)
        for each in inside:
            for name in each.operands:
                users[name].append(each)
        for each in inside:
            if each.op == "parameter" and (uses := users[each.name]):
                index = int(re.search(r"parameter\((\d+)\)", each.line)[1])
                if all(use.op in ("dynamic-slice", "slice") for use in uses):
                    read[index] = min(read[index], sum(size(use.shape) for use in uses))
                elif all(use.op == "dynamic-update-slice" and use.operands[0] == each.name for use in uses):
                    part = sum(size(self.shapes[use.operands[1]]) for use in uses)
                    written, read[index] = max(written - read[index], 0) + min(part, read[index]), 0
        return read, written


def trips(program: Program, condition: str, body: str) -> int | None:
    """Returns how often a loop runs, from `counter < N` and the counter's step; None where N is computed."""
    test = program.lines[condition][-1]
    counts = [value for name in test.operands if (value := _constant(program, condition, name)) is not None]
    if not counts:
        return None
    counter = next(re.search(r"index=(\d+)", each.line) for each in program.lines[condition] if "index=" in each.line)
    name = program.lines[body][-1].operands[int(counter[1])]
    added = next((each for each in program.lines[body] if each.name == name), None)
    steps = [_constant(program, body, other) for other in added.operands] if added else []
    return -(-counts[0] // next((value for value in steps if value), 1))


def _constant(program: Program, where: str, name: str) -> int | None:
    found = (each for each in program.lines[where] if each.name == name and each.op == "constant")
    line = next((each.line for each in found if each.shape.startswith("s32[]")), "")
    return int(re.search(r"constant\((-?\d+)\)", line)[1]) if line else None


def _pairs(left: int, right: int, made: int, stride: int, left_dilate: int, right_dilate: int, pad: int) -> int:
    """Returns how many (place, kernel place) pairs of one axis of a convolution meet an input and no padding."""
    place = np.arange(made)[:, None] * stride + np.arange(right)[None] * right_dilate - pad
    return int(np.sum((place >= 0) & (place % left_dilate == 0) & (place // left_dilate < left)))


def groups(line: str) -> list[list[int]]:
    """Returns groups of devices that a collective joins: all that are listed, or one of groups that are alike."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [_numbers(text) for text in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(math.prod(_numbers(iota[2]))).reshape(_numbers(iota[2]))
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return ids.reshape(_numbers(iota[1])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        ids = np.arange(math.prod(map(int, axes.values()))).reshape([int(side) for side in axes.values()])
        taken = set(re.findall(r"'(\w+)'", mesh[2]))  # of an axis that is split further, all
        return [ids[tuple(slice(None) if axis in taken else 0 for axis in axes)].reshape(-1).tolist()]
    return []


def arrays(shape: str) -> list[tuple[str, str]]:
    """Returns (dtype, sides as text) of each array of a shape, a tuple's one after the other."""
    return re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shape))


def size(shape: str) -> int:
    """Returns the bytes of a shape, a tuple's together."""
    return sum(WIDTHS.get(kind, 4) * math.prod(_numbers(found)) for kind, found in arrays(shape))


def in_hbm(shape: str) -> int:
    """Returns the bytes of those arrays of a shape that are not in a memory on the chip: S(n) in their layout."""
    return sum(size(text) for text in _parts(shape) if not re.search(r"S\(\d+\)", text))


def sides(shape: str) -> list[int]:
    """Returns the sides of the first array of a shape."""
    return _numbers((arrays(shape) or [("", "")])[0][1])


def dtype(shape: str) -> str:
    """Returns the dtype of the first array of a shape."""
    return (arrays(shape) or [("", "")])[0][0]


def _parts(shape: str) -> list[str]:
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
