"""Being told to stop: a machine that is taken away sends SIGTERM, and the run saves before it goes."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Preempted(Exception):
    """The run was told to stop and has saved what it had; its text says where it stands."""


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """While it is open, SIGTERM no longer ends this process; yields step -> whether to stop after this step.

    Of several processes all stop after the same step: there jax's own service, which jax.distributed.initialize starts,
    hears the signal on any of them and names the step. Outside the main thread signals cannot be heard.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
