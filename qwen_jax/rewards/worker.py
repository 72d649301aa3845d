"""The process that a user's reward function runs in: python -m qwen_jax.rewards.worker PATH DESCRIPTOR

`outside.Outside` starts it, and kills it when it hangs. It ends when its standard input does: when the run has.
"""

import os
import sys
import threading
from multiprocessing.connection import Connection

from qwen_jax.errors import InputError
from qwen_jax.rewards import calling


def _end_with(descriptor: int) -> None:
    """Ends this process when the other end of a pipe is closed, whatever the function is doing."""
    while os.read(descriptor, 1):
        pass
    os._exit(0)


def main(path: str, descriptor: int) -> None:
    """Loads the function, says so, and answers until nobody asks."""
    lifeline = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    link = Connection(descriptor)
    try:
        function = calling.load(path)
    except InputError as error:
        link.send(str(error))
        return
    link.send("")
    while True:
        try:
            samples = link.recv()
        except EOFError:
            return
        link.send(calling.call(function, samples))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
