"""The accounts of a run, over all its starts: where the time and the memory went, and how much was learned from."""

import contextlib
import dataclasses
import json
import pathlib
import resource
import sys
import time
from collections.abc import Iterator

import jax

from qwen_jax.files import write_whole
from qwen_jax.training import hosts

FILE = "accounts.json"


@dataclasses.dataclass
class Accounts:
    """What is added up while a run trains; part of each checkpoint, so that steps that are lost are not in it.

    Attributes:
      starts: how often the run was started.
      seconds: wall time by what it went into: "compile", "data", "step", "evaluation", "first samples" (which compiles
        them), "samples", "checkpoint".
      steps, weight: how many steps were taken, and the sum of their weights (learned tokens, of a language model).
      flops_per_token, peak_flops, peak_source: what utilisation is counted with.
      memory: bytes: of the train step on each device, as compiled, "arguments", "outputs", "aliased", "temporaries";
        the most that were in use, "device_peak" where the device tells, and "host_peak" of the first process.
    """

    starts: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: int = 0
    weight: float = 0.0
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    peak_source: str = ""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time that passes inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin

    def take_memory(self, compiled) -> None:
        """Takes in what a compiled step needs."""
        analysis = compiled.memory_analysis()
        if analysis is not None:
            names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
            self.memory |= {ours: getattr(analysis, f"{name}_size_in_bytes") for ours, name in names.items()}

    def save(self, workdir: pathlib.Path) -> None:
        """Writes accounts.json, on the first process."""
        unit = 1 if sys.platform == "darwin" else 1024
        self.memory["host_peak"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            self.memory["device_peak"] = stats["peak_bytes_in_use"]
        if hosts.is_first():
            write_whole(workdir / FILE, json.dumps(dataclasses.asdict(self), indent=2))


def read(workdir: pathlib.Path) -> Accounts | None:
    """Returns the accounts of the finished run in this folder; None where there are none that can be read."""
    try:
        return Accounts(**json.loads((workdir / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
