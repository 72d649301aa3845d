"""A reward function in a process of its own: it may hang, crash or leak, and the run goes on.

Not multiprocessing's spawn: that loads the run's main module again, and with it jax and the accelerator.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe

from qwen_jax.errors import InputError
from qwen_jax.rewards import calling
from qwen_jax.rewards.calling import Trouble
from qwen_jax.rewards.sample import Sample

PATIENCE = 300.0  # seconds that loading a function's module may take


class Outside:
    """Calls "package.module:function" in a process that is killed when it takes too long, and started again.

    A batch has `timeout` seconds. Where that call fails, its samples are asked one at a time: each has `alone` seconds,
    all together `timeout` more, and who is not reached has timed out, too. Starting the process, and loading the
    function's module, is not counted.
    """

    def __init__(self, path: str, *, timeout: float, alone: float | None = None):
        """Starts the process.

        Args:
          path: of the function.
          timeout: seconds for a batch.
          alone: seconds for a sample by itself; a tenth of `timeout` if None.

        Raises:
          InputError: the function cannot be loaded, or not in time.
        """
        self.path, self.timeout, self.alone = path, timeout, timeout / 10 if alone is None else alone
        self._start()

    def __call__(self, samples: Sequence[Sample]) -> list[float | Trouble]:
        """Returns a value or a trouble for each sample."""
        left = self.timeout

        def alone(one: Sequence[Sample]):
            nonlocal left
            if left <= 0:
                return Trouble("timeout", f"not reached: others took {self.timeout:g} s")
            found, seconds = self._ask(one, min(left, self.alone))
            left -= seconds
            return found

        return calling.each(list(samples), lambda all_of_them: self._ask(all_of_them, self.timeout)[0], alone)

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        self._stop()

    def _ask(self, samples: Sequence[Sample], limit: float) -> tuple[list[float | Trouble] | Trouble, float]:
        """Calls once; returns what came of it, and the seconds it took."""
        if not self._stop.alive:
            self._start()
        begin = time.monotonic()
        try:
            self._link.send(samples)
            found = self._link.recv() if self._link.poll(limit) else Trouble("timeout", f"took over {limit:g} s")
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)  # so that its own status is seen, not that of being killed
            found = Trouble("died", f"its process ended with status {self._process.returncode}")
        if isinstance(found, Trouble) and found.kind in ("timeout", "died"):
            self._stop()
        return found, time.monotonic() - begin

    def _start(self) -> None:
        """Starts a process and waits until it has loaded the function."""
        self._link, theirs = Pipe()
        # The same modules as here; and the accelerator is the run's.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        environment["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen_jax.rewards.worker", self.path, str(theirs.fileno())],
            stdin=subprocess.PIPE, stdout=2, env=environment, pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._stop = weakref.finalize(self, _kill, self._process, self._link)
        try:
            refused = self._link.recv() if self._link.poll(PATIENCE) else f"no answer in {PATIENCE:g} s"
        except EOFError:
            self._stop()
            refused = f"its process ended with status {self._process.returncode}"
        if refused:
            self._stop()
            known = refused.startswith("the reward function")
            raise InputError(refused if known else f"the reward function {self.path!r} cannot be loaded: {refused}")


def _kill(process: subprocess.Popen, link) -> None:
    """Ends a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its group is its own, and holds it until it is waited for
    process.wait()
    process.stdin.close()
    link.close()
