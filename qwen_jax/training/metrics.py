"""Where a run's figures go: metrics.jsonl, TensorBoard, and one line (or a bar) for whoever is watching."""

import json
import math
import os
import pathlib
import sys

from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.training import hosts


class MetricsWriter:
    """Appends {"step": n, name: value, ...} lines to metrics.jsonl and the same scalars to TensorBoard.

    Of several processes the first writes; the others' calls do nothing.
    """

    def __init__(self, workdir: pathlib.Path, *, start: int):
        """Opens the files of a run that stands at step `start`; lines of later steps are of a run that was lost."""
        self._file = self._board = None
        if not hosts.is_first():
            return
        import tensorboardX

        path = workdir / "metrics.jsonl"
        # A run without a checkpoint begins anew, and so evaluates step 0 again.
        kept = [json.dumps(row) for row in read(workdir) if 0 < start >= row["step"]]
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1 if start else 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the scalars of one step; those that are not finite have no JSON and are left out."""
        if self._file is None:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read(workdir: pathlib.Path | str) -> list[dict]:
    """Returns the lines of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
      InputError: on any other line that is not JSON, by its number.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}:{number} is not JSON: {line[:80]!r}") from None
    return rows


class Progress:
    """A bar with the time left on a terminal, plain lines elsewhere; of several processes the first shows it."""

    def __init__(self, label: str, *, start: int, total: int):
        import tqdm

        self._label, self._total = label, total
        # A terminal that says it has no lines (some containers' do) gets plain lines: a bar would draw nothing there.
        self._live = hosts.is_first() and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
        self._bar = tqdm.tqdm(
            desc=label, initial=start, total=total, disable=not self._live, dynamic_ncols=True, unit="step"
        )

    def update(self) -> None:
        """One step more."""
        self._bar.update()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the figures of a step: behind the bar, or as a line."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        if self._live:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        line = f"[{self._label}] {text}"
        if self._live:
            self._bar.write(line, file=sys.stdout)
        elif hosts.is_first():
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
