"""The one exception for mistakes in what a user handed over: a flag, a file, a shape, a workdir."""

import contextlib
import io


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, where, what was found, what would be right.

    Commands print the line and exit with status 2; any other exception is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def boxes_as_lines():
    """Makes of what tyro tells in a box before it exits, an InputError of one line.

    Raises:
      InputError: tyro found a mistake in the flags.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        box = told.getvalue().split("│ ─")[0].splitlines()[1:]
        lines = [line.strip(" │╭╮╰╯─") for line in box]
        raise InputError(" ".join(line for line in lines if line)) from None
