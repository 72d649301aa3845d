"""Chips and slices: what a name such as v5p-128 or h100x64 stands for, and what one chip can do at best.

A TPU slice is called as Google Cloud calls it: v4 and v5p by TensorCores, two a chip (v5p-128 is 64 chips); v5e and v6e
by chips. The shape may be given instead, as jax has it: v5p:4x4x4. GPUs are counted: h100x64 is 8 nodes of 8.
"""

import dataclasses
import difflib
import math
import re

from qwen_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, one way where there are two.

    Attributes:
      platform: of jax.
      flops: dense bfloat16 FLOP/s.
      capacity: bytes of HBM that a program may use.
      memory: bytes/s of HBM.
      ici: bytes/s that a chip can send over all its links to the chips that it is wired to (TPU: links of the torus;
        GPU: NVLink within a node).
      dcn: bytes/s that it can send further: its share of the host's network.
      cores: by which a slice's name counts.
      sides: chips -> how a slice of so many is wired; of GPUs none.
      per_host: chips of one host.
      clock: Hz, of the cycles that the compiler estimates; 0 of a GPU.
      variant: of the chip, where the compiler's own choice is not what one gets: a v4 chip as one device.
    """

    platform: str
    flops: float
    capacity: int
    memory: float
    ici: float
    dcn: float
    cores: int = 1
    sides: tuple[str, ...] = ()
    per_host: int = 4
    clock: float = 0.0
    variant: str = ""


CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# FLOP/s, memory, links of a torus (bytes/s of one x links) and host networks: Google Cloud's pages "TPU v4", "TPU v5e",
# "TPU v5p", "TPU v6e" (system architecture), network of a host shared by its chips; H100: NVIDIA's data sheet of the
# SXM5 board (NVLink 900 GB/s both ways) and of DGX H100 (one 400 Gbit/s adapter a GPU). Capacity: what the TPU compiler
# refuses to go beyond, as its own message has it; of the H100 the device's memory (launch/h100.txtpb).
CHIPS = {
    "v4": Chip("tpu", 275e12, int(30.75 * GIB), 1228e9, 6 * 45e9, 6.25e9, 2, CUBES, 4, 1.05e9, "megacore"),
    "v5e": Chip("tpu", 197e12, int(15.75 * GIB), 819e9, 4 * 45e9, 3.125e9, 1, SQUARES, 4, 1.5e9),
    "v5p": Chip("tpu", 459e12, int(95.74 * GIB), 2765e9, 6 * 90e9, 6.25e9, 2, CUBES, 4, 1.75e9),
    "v6e": Chip("tpu", 918e12, int(31.25 * GIB), 1640e9, 4 * 90e9, 12.5e9, 1, SQUARES, 4, 1.75e9),
    "h100": Chip("cuda", 989e12, 84_942_979_072, 3350e9, 450e9, 50e9, 1, (), 8),
}
OTHER_NAMES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of one kind of chip.

    Attributes:
      name: as it was given.
      chip: a key of CHIPS.
      shape: "4x4x4" of each TPU slice; "nodes x GPUs of a node" of GPUs.
      slices: how many.
    """

    name: str
    chip: str
    shape: str
    slices: int = 1

    @property
    def of_chip(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        """How many chips there are, of all slices."""
        return self.slices * math.prod(int(side) for side in self.shape.split("x"))


def parse(name: str, slices: int = 1) -> Topology:
    """Returns the topology of this name.

    Raises:
      InputError: where there is none; the nearest are named.
    """
    if slices < 1:
        raise InputError(f"--slices is {slices}; expected at least 1")
    found = re.fullmatch(r"([a-z]+\d*[a-z]*)(-|:|x)([\dx]+)", name.lower())
    kind = found and OTHER_NAMES.get(found[1], found[1])
    if kind not in CHIPS:
        near = difflib.get_close_matches(name, names(), n=3) or ["v5p-128", "v6e-256", "h100x8"]
        raise InputError(f"no topology is called {name!r}; chips: {', '.join(CHIPS)}; such as {', '.join(near)}")
    chip = CHIPS[kind]
    if chip.platform == "cuda":
        return _gpus(name, kind, found[3], slices)
    if found[2] == ":":
        if not re.fullmatch(r"\d+(x\d+)+", found[3]):
            raise InputError(f"{name!r} has no shape; expected such as {kind}:{chip.sides[2]}")
        return Topology(name, kind, found[3], slices)
    of_size = {str(chip.cores * math.prod(map(int, sides.split("x")))): sides for sides in chip.sides}
    if found[3] not in of_size:
        what = "TensorCores, two a chip" if chip.cores == 2 else "chips"
        raise InputError(
            f"no slice of {kind} is called {name!r} ({what}); expected {kind}-N, N of {', '.join(of_size)}"
        )
    return Topology(name, kind, of_size[found[3]], slices)


def _gpus(name: str, kind: str, count: str, slices: int) -> Topology:
    per_host = CHIPS[kind].per_host
    if slices > 1:
        raise InputError(f"--slices {slices} is for TPUs; of GPUs give the number: {kind}x{slices * per_host}")
    if not count.isdigit() or int(count) < 1 or (int(count) > per_host and int(count) % per_host):
        raise InputError(f"{name!r} is no number of GPUs; expected up to {per_host}, or a multiple of {per_host}")
    nodes = max(int(count) // per_host, 1)
    return Topology(name, kind, f"{nodes}x{int(count) // nodes}")


def names() -> list[str]:
    """Returns the names of the usual slices."""
    found = []
    for kind, chip in CHIPS.items():
        found += [f"{kind}-{chip.cores * math.prod(map(int, sides.split('x')))}" for sides in chip.sides]
    return [*found, *(f"h100x{count}" for count in (1, 8, 16, 64, 512))]
