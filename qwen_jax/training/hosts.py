"""What the processes of one run do once: the first writes into the shared folder, the others wait for it."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import InputError


def is_first() -> bool:
    """Returns whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def once(action: Callable[[], None]) -> None:
    """Runs action on the first process; every process returns when it is done.

    Raises:
      InputError: on every process, where action raised it: none may be left waiting for the others.
    """
    failure = None
    if is_first():
        try:
            action()
        except InputError as error:
            failure = error
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
        if failed and failure is None:
            raise InputError("the first process stopped on bad input; its own line says why")
    if failure is not None:
        raise failure
