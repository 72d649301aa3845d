"""The plan of the house, read from the source: who may import whom, and what importing costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "qwen_jax"

FLOORS = {
    "errors": 0, "files": 0, "batches": 0, "long_context": 0, "config": 0, "sharding": 0, "tokenizer": 0,
    "data": 1, "ops": 1, "objectives": 1, "rewards": 1,
    "models": 2,
    "hf": 3, "rollout": 3,
    "training": 4,
    "eval": 5, "chat": 5,
}  # fmt: skip

# Floor 0 is made of leaves that everyone names: those below may be imported by their neighbours on the floor.
LEAVES = {"errors", "files", "batches", "long_context"}
SIDEWAYS = {("sharding", "config"), ("objectives", "ops"), ("eval", "chat")}
# The model arrives as a callable; data workers must not load JAX.
NEVER = {
    "training": ("models", "flax"),
    "objectives": ("models", "config", "flax"),
    "ops": ("models", "config", "flax"),
    "data": ("models", "jax", "flax", "tensorflow"),
    "tokenizer": ("jax", "flax", "tensorflow", "torch"),
    "rewards": ("models", "jax", "flax", "tensorflow"),  # it is loaded into the processes of users' functions
}
BANNED_NAMES = {"utils", "common", "base", "core", "helpers"}
# Named, not found: a checkout also holds environments, runs and builds, which nobody wrote.
FOLDERS = ("qwen_jax", "experiments", "launch", "tests", "benchmarks")
STORED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in STORED if path.is_relative_to(PACKAGE) and path != PACKAGE / "__init__.py"]


def part(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, inside functions too; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; say the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_below(path):
    here = part(path)
    assert here in FLOORS, f"{path}: {here} has no floor; see docs/decisions.md"
    for name in imports(path):
        words = name.split(".")
        assert words[0] not in ("experiments", "launch", "tests", "benchmarks"), f"{path} imports {name}, of the roof"
        other = words[1] if words[0] == "qwen_jax" and len(words) > 1 else None
        if other and other != here:
            below = FLOORS[other] < FLOORS[here] or other in LEAVES or (here, other) in SIDEWAYS
            assert below, f"{path} ({here}, floor {FLOORS[here]}) imports {name} (floor {FLOORS[other]})"
        for banned in NEVER.get(here, ()):
            assert banned not in (words[0], other), f"{path} ({here}) imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.name)
def test_experiments_have_recipes_a_smoke_and_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    if path.name != "__init__.py":
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"smoke", "run"} <= names, f"{path} lacks smoke() or run()"


def test_no_stored_file_is_outside_the_folders_that_are_checked():
    """By git, where this is a checkout: a folder that is new belongs into FOLDERS."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {ROOT / name for name in listed if (ROOT / name).exists()} <= {*STORED, ROOT / "setup.py"}


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_they_are_and_stay_small(path):
    assert path.stem not in BANNED_NAMES, f"{path}: the name says nothing"
    text = path.read_text()
    if path.is_relative_to(PACKAGE):
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines; split it"


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_the_package_loads_nothing_heavy_and_no_device():
    code = """
import sys, qwen_jax
from qwen_jax import config, objectives, models
print([name for name in ("tensorflow", "torch", "tensorflow_datasets", "orbax", "grain", "matplotlib", "tokenizers",
       "tiktoken", "sentencepiece", "flax.nnx") if name in sys.modules])
import jax._src.xla_bridge as bridge
print(bridge._backends)
"""
    assert run_python(code).split("\n")[:2] == ["[]", "{}"]


def test_importing_the_package_runs_little_more_than_jax_and_flax():
    """Counted in modules, which do not vary with the machine's load; `benchmarks/import_time.py` takes the seconds."""
    count = "import sys; print(len(sys.modules))"
    ours = int(run_python(f"import qwen_jax; from qwen_jax import config, models; {count}"))
    theirs = int(run_python(f"import jax, jax.numpy, flax.linen; {count}"))
    assert ours <= 1.1 * theirs
