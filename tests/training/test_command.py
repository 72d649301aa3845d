"""The command line: recipes by name, flags from the dataclass, one line for bad input."""

import re
from dataclasses import dataclass

import pytest

from qwen_jax.errors import InputError
from qwen_jax.training import command
from qwen_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = OptimizerConfig()
    length: int = 8


def small() -> Config:
    """A small one."""
    return Config(length=4)


RECIPES = {"small": small, "large": Config}


def parse(*argv):
    return command.parse("An experiment.", RECIPES, list(argv))


def test_flags_change_the_recipe():
    recipe, folder, config = parse("small", "--workdir", "w", "--optimizer.peak-lr", "1e-5")
    assert (recipe, folder) == ("small", "w")
    assert config == Config(OptimizerConfig(peak_lr=1e-5), length=4)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["smal", "--workdir", "w"], "no recipe is called 'smal'; nearest: small"),
        (["small", "--workdir", "w", "--optimizer.peek-lr", "1"], "unknown flag '--optimizer.peek-lr'; nearest: --opt"),
        (["small"], "--workdir is missing"),
        (["small", "--workdir"], "--workdir has no value"),
        (["small", "--workdir", "w", "--length", "abc"], "Error parsing --length: invalid literal for int()"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(InputError, match=re.escape(message)):
        parse(*argv)
    with pytest.raises(SystemExit) as stop:
        command.main("An experiment.", RECIPES, lambda *args: None, argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_the_recipes(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "An experiment." in out and re.search(r"small +A small one\.", out)


def test_a_bug_keeps_its_traceback():
    def run(config, folder, recipe):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.main("An experiment.", RECIPES, run, ["small", "--workdir", "w"])


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def run(config, folder, recipe):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command.main("An experiment.", RECIPES, run, ["small", "--workdir", "w"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from the last checkpoint\n"
