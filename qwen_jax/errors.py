"""The one exception for mistakes in what a user handed over: a flag, a file, a shape, a workdir."""


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, where, what was found, what would be right.

    Commands print the line and exit with status 2; any other exception is a bug and keeps its traceback.
    """
