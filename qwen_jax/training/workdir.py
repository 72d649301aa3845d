"""A run's folder: its resolved config, what it was run with, and the guard against mixing two runs.

config.json    experiment, recipe, the whole config and what in it is not the recipe's, versions, git revision, words
accounts.json  where time and memory went
metrics.jsonl  checkpoints/  samples/  plots/  report.md  report.html  and TensorBoard events
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from importlib import metadata

from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.training import hosts

# Where a run lives, how it is computed and how often it reports may change between two starts; what it computes, not.
FREE_TO_CHANGE = {
    *("mesh", "samples"),
    *("remat", "attention", "scan_layers", "vocabulary_chunks"),
    *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_skipped"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "tiktoken")


def prepare(
    workdir: str | os.PathLike, config, *, experiment: str, recipe: str, recipes: Mapping[str, Callable] | None = None
) -> pathlib.Path:
    """Makes the folder, or checks that it is this run's own, and writes config.json, on the first process.

    A folder that holds nothing but a config.json is of a run that stopped before it did anything: it is taken over.

    Args:
      workdir: the folder.
      config: the experiment's frozen dataclass, resolved.
      experiment, recipe: what was asked for, for the record.
      recipes: the experiment's, to tell what differs from the one of that name.

    Raises:
      InputError: where the folder holds a run with another config (the message names the first field that differs) or
        something else, or cannot be written.
    """
    workdir = pathlib.Path(workdir)

    def write():
        try:
            _prepare(workdir, config, experiment, recipe, (recipes or {}).get(recipe))
        except OSError as error:
            raise InputError(f"{workdir} cannot be a run's folder: {error.strerror}; use another --workdir") from None

    hosts.once(write)
    return workdir


def _prepare(workdir: pathlib.Path, config, experiment: str, recipe: str, made: Callable | None) -> None:
    path = workdir / "config.json"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"experiment": experiment, "recipe": recipe, "config": to_json(config), "started": now, "argv": sys.argv}
    held = sorted(entry.name for entry in workdir.iterdir()) if workdir.exists() else []
    if path.name in held:
        found = read(workdir)
        if held != [path.name]:
            _check_same(path, found, record)
            record["started"] = found["started"]
    elif held:
        raise InputError(f"{workdir} is not empty and holds no config.json: not a run's folder; use another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    changed = dict(differences(to_json(made()), record["config"])) if made else None
    record |= {"changed": changed, "versions": versions(), "git": git_revision()}
    write_whole(path, json.dumps(record, indent=2))


def read(workdir: str | os.PathLike) -> dict:
    """Returns what config.json says.

    Raises:
      InputError: where it is missing, cut short or not a run's.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not {"experiment", "recipe", "config", "started"} <= record.keys():
            raise ValueError("expected experiment, recipe, config and started in it")
        return record
    except FileNotFoundError:
        raise InputError(f"{path} is missing; expected the folder of a run") from None
    except ValueError as error:
        raise InputError(f"{path} is not the config of a run: {error}") from None


def model_config(workdir: str | os.PathLike) -> QwenConfig:
    """Returns the config of the model that the run in this folder trains.

    Raises:
      InputError: where config.json has none, or fields that QwenConfig does not know.
    """
    fields = read(workdir)["config"].get("model")
    if not isinstance(fields, dict):
        raise InputError(f"{pathlib.Path(workdir) / 'config.json'} has no config.model; expected the fields of a model")
    return QwenConfig().replace(**fields)


def lora_config(workdir: str | os.PathLike) -> LoraConfig:
    """Returns what the run in this folder trains beside its base; of rank 0 where it trains the model itself."""
    fields = read(workdir)["config"].get("lora", {})
    return LoraConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def to_json(config) -> dict:
    """Returns a dataclass as plain JSON values, nested dataclasses as objects."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """Returns the revision of this code, marked when files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _check_same(path: pathlib.Path, found: dict, record: dict) -> None:
    for name in ("experiment", "recipe"):
        if found[name] != record[name]:
            raise InputError(f"{path} is of {name} {found[name]!r}, not {record[name]!r}; use another --workdir")
    for flag, (old, new) in differences(found["config"], record["config"], ignoring=FREE_TO_CHANGE):
        raise InputError(f"{path} holds {flag} = {old!r}, this run wants {new!r}; use another --workdir")


def differences(
    old: dict, new: dict, prefix: str = "", *, ignoring: Container[str] = ()
) -> Iterator[tuple[str, tuple]]:
    """Yields (name, (old value, new value)) of the fields of two configs that differ; names of inner ones have dots."""
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if key in ignoring or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.", ignoring=ignoring)
        else:
            yield f"{prefix}{key}", (a, b)
