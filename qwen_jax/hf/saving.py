"""A parameter tree to a folder that transformers loads: written beside the target, then moved into its place."""

import json
import logging
import math
import os
import pathlib
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax import models
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.hf import boxes, files, layouts, settings
from qwen_jax.hf.layouts import Entry

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model.*\.(bin|json)")  # ours, and the same as pickles


class Item(NamedTuple):
    """One tensor to write."""

    name: str
    entry: Entry
    place: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: int


def save(
    path: str | os.PathLike,
    config: QwenConfig,
    params: dict,
    *,
    shard_bytes: int = SHARD_BYTES,
    pad_token_id: int | None = None,
) -> None:
    """Writes config.json and safetensors, in the qwen2 or qwen3 layout, or theirs with experts.

    A reward model (config.head "score") becomes one that transformers loads as a sequence classifier with one label.

    The folder appears whole or not at all. A checkpoint that is there already is replaced in the last step; until then
    nothing of it is touched. Its files of other kinds (tokenizer, generation settings) are kept. The host holds one
    layer's tensor at a time. In a multi-host run every process calls this; the first one writes.

    Args:
      path: the folder.
      config: the model.
      params: its parameters, all of one dtype, which is the files' dtype.
      shard_bytes: of tensors in one file at most; above it several files and an index are written.
      pad_token_id: written to config.json: transformers reads a padded batch's scores before this token.

    Raises:
      InputError: where `params` is not the tree of `config`, the target is no checkpoint, or the model has no published
        layout.
    """
    dtype = _dtype(config, params)
    leaves = layouts.flat(params)

    def fetch(entry: Entry, place: tuple[int, ...]) -> np.ndarray:
        return on_host(leaves[entry.path][place] if place else leaves[entry.path])

    fields = settings.write(config, dtype) | ({} if pad_token_id is None else {"pad_token_id": pad_token_id})
    write(pathlib.Path(path), config, dtype, fetch, shard_bytes, fields=fields, primary=jax.process_index() == 0)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("qwen_jax.hf.save")  # nobody goes on before the folder is there


def write(
    target: pathlib.Path,
    config: QwenConfig,
    dtype: str,
    fetch: Callable[[Entry, tuple[int, ...]], np.ndarray],
    shard_bytes: int,
    *,
    fields: dict,
    companions: tuple[pathlib.Path, ...] = (),
    drop: tuple[str, ...] = (),
    primary: bool = True,
) -> None:
    """Writes a checkpoint whose parameters are fetched one layer at a time.

    Args:
      target: the folder.
      config: the model.
      dtype: of what is written.
      fetch: (row, place of its leading axes) -> that part of the parameter in our other axes, in that dtype.
      shard_bytes: as in `save`.
      fields: config.json, with the model_type of a layout in `layouts.TABLES`.
      companions: files to copy beside the weights.
      drop: names of files that do not stay in a folder that is replaced.
      primary: whether this process writes; the others only take part in the fetching.

    Raises:
      InputError: as `save` does.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}; expected at least 1")
    shards = _shards(_items(config, fields["model_type"], dtype), shard_bytes)
    if not primary:
        for item in (item for shard in shards for item in shard):
            fetch(item.entry, item.place)
        return
    target = target.resolve()
    _refuse_target(target)
    scratch = _beside(target, "partial")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        _fill(scratch, fields, shards, dtype, fetch)
        _keep_other_files(target, scratch, drop)
        for file in companions:
            shutil.copy2(file, scratch / file.name)
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("saved %s: %d files of weights", target, len(shards))


def _dtype(config: QwenConfig, params: dict) -> str:
    """Checks the tree against the model; returns the dtype of its leaves."""
    expected, found = layouts.flat(models.abstract(config)), layouts.flat(params)
    wrong = [path for path in sorted(expected.keys() | found.keys()) if path not in expected or path not in found]
    wrong += [path for path in expected if path in found and expected[path].shape != found[path].shape]
    if wrong:
        raise InputError(f"params do not fit their config (missing, unexpected or mis-shaped): {', '.join(wrong)}")
    dtypes = {str(leaf.dtype) for leaf in found.values()}
    if len(dtypes) > 1 or not dtypes <= set(files.CODES):
        raise InputError(f"params are {', '.join(sorted(dtypes))}; expected one of {', '.join(files.CODES)} for all")
    return dtypes.pop()


def _items(config: QwenConfig, model_type: str, dtype: str) -> list[Item]:
    width = jax.numpy.dtype(dtype).itemsize
    return [
        Item(entry.tensor(place), entry, place, shape, width * math.prod(shape))
        for entry, _ in layouts.table(model_type, config, models.abstract(config))
        for shape in [entry.file_shape(config)]
        for place in entry.places(config)
    ]


def _shards(items: list[Item], limit: int) -> list[list[Item]]:
    """Fills files in order; a tensor larger than the limit gets a file of its own."""
    shards: list[list[Item]] = [[]]
    room = limit
    for item in items:
        if shards[-1] and item.bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item.bytes
    return shards


def _fill(folder: pathlib.Path, fields: dict, shards: list[list[Item]], dtype: str, fetch) -> None:
    """Writes everything of a checkpoint into an empty folder."""
    count = len(shards)
    names = [files.SINGLE]
    if count > 1:
        names = [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
        places = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        total = sum(item.bytes for shard in shards for item in shard)
        _write(folder / files.INDEX, [_json({"metadata": {"total_size": total}, "weight_map": places})])
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, _stream(shard, dtype, fetch))
    _write(folder / "config.json", [_json(fields)])


def _stream(shard: list[Item], dtype: str, fetch) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file: length of the header, header, tensors one by one."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in shard:
        begin, end = end, end + item.bytes
        header[item.name] = {"dtype": files.CODES[dtype], "shape": list(item.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on 8 bytes
    yield struct.pack("<Q", len(text))
    yield text
    for item in shard:
        yield boxes.to_file(item.entry, item.shape, fetch(item.entry, item.place)).reshape(-1).view(np.uint8).data


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(file: pathlib.Path, pieces) -> None:
    with open(file, "wb") as opened:
        for piece in pieces:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())  # the rename that follows must not be on the disk before the bytes


def _refuse_target(target: pathlib.Path) -> None:
    """Refuses to replace what may be something else than a checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file; expected a folder or nothing")
    entries = list(target.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if folders:
        raise InputError(f"{target}: holds folders ({', '.join(folders[:3])}), so it is not replaced; choose another")
    if entries and not (target / "config.json").is_file():
        raise InputError(f"{target}: holds files but no config.json, so it is not replaced; choose another")


def _beside(target: pathlib.Path, suffix: str) -> pathlib.Path:
    """Returns a new name on the target's file system."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.{suffix}"


def _keep_other_files(target: pathlib.Path, scratch: pathlib.Path, drop: tuple[str, ...]) -> None:
    """Copies what is no weight and no config.json: tokenizer, chat template, generation settings."""
    for entry in target.iterdir() if target.is_dir() else ():
        replaced = entry.name in (files.INDEX, "config.json", *drop) or WEIGHTS.fullmatch(entry.name)
        if not replaced:
            shutil.copy2(entry, scratch / entry.name)


def _swap(scratch: pathlib.Path, target: pathlib.Path) -> None:
    """Puts the new folder in the old one's place; the old one comes back if that fails."""
    if not target.exists():
        os.rename(scratch, target)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def on_host(leaf) -> np.ndarray:
    """Returns the values of an array; gathers it first where other hosts hold parts."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
