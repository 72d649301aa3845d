"""The command line of an experiment: a recipe's name, a workdir, and flags made from the recipe's own dataclass."""

import argparse
import difflib
import logging
import sys
from collections.abc import Callable

from qwen_jax.errors import InputError, boxes_as_lines
from qwen_jax.training.preemption import EXIT_CODE, Preempted


def main(doc: str, recipes: dict[str, Callable], run: Callable, argv: list[str] | None = None) -> None:
    """Runs `python -m experiments.NAME RECIPE --workdir DIR [--field value ...]` and exits.

    Exit status: 0 done; 2 bad input, told in one line; 75 told to stop by SIGTERM and saved: start it again; 130
    stopped by Ctrl-C; anything else is a bug, with a traceback.

    Args:
      doc: the experiment's docstring, for --help.
      recipes: name -> function returning a frozen dataclass.
      run: (config, workdir, recipe name) -> None.
      argv: the words after the module; sys.argv[1:] if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of each of its steps, and of what it raises
    try:
        recipe, workdir, config = parse(doc, recipes, argv)
        run(config, workdir, recipe)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as told:
        print(f"{told}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse(doc: str, recipes: dict[str, Callable], argv: list[str]):
    """Returns (recipe name, workdir, config) from the words of a command line.

    Raises:
      InputError: on an unknown recipe or flag (the nearest are named), or no --workdir.
    """
    import tyro

    listing = "\n".join(f"  {name:<24} {_summary(function)}" for name, function in recipes.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{doc.strip()}\n\nrecipes:\n{listing}\n\nRECIPE --help lists its flags and their values.")
        sys.exit(0)
    if argv[0] not in recipes:
        near = difflib.get_close_matches(argv[0], recipes, n=3) or list(recipes)
        raise InputError(f"no recipe is called {argv[0]!r}; nearest: {', '.join(near)}")
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    head.add_argument("--workdir")
    try:
        known, rest = head.parse_known_args(argv[1:])
    except argparse.ArgumentError:
        raise InputError("--workdir has no value; expected a folder for this run's checkpoints and figures") from None
    default = recipes[argv[0]]()
    with boxes_as_lines():
        config, unknown = tyro.cli(
            type(default), default=default, args=rest, return_unknown_args=True, prog=argv[0], description=doc
        )
    if unknown:
        raise InputError(f"unknown flag {unknown[0]!r}; nearest: {', '.join(_nearest(unknown[0], default))}")
    if not known.workdir:
        raise InputError("--workdir is missing; expected a folder for this run's checkpoints and figures")
    return argv[0], known.workdir, config


def _summary(function: Callable) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def _nearest(flag: str, config) -> list[str]:
    flags = sorted(_flags(config))
    return difflib.get_close_matches(flag.split("=")[0], flags, n=3, cutoff=0.3) or flags


def _flags(config, prefix: str = "--"):
    for name, value in vars(config).items():
        dashed = f"{prefix}{name.replace('_', '-')}"
        if hasattr(value, "__dataclass_fields__"):
            yield from _flags(value, f"{dashed}.")
        else:
            yield dashed
