"""Published weights to a parameter tree, each device's part read straight from the mapped files."""

import itertools
import logging
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config as configs
from qwen_jax import models, sharding
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.hf import boxes, files, layouts, settings
from qwen_jax.hf.layouts import Entry

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; what XLA asks of a buffer on a CPU
COMPARED_BYTES = 1 << 26  # how much of a duplicate head is in memory at once


def load(
    path: str | os.PathLike, *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[QwenConfig, dict]:
    """Reads a checkpoint folder of any Qwen from v1 to Qwen3, experts or none: config.json and safetensors.

    Each process reads only what its own devices hold. Beyond what it puts on them, a host holds one device's part of
    one parameter and one tensor's part of that. Nothing in the folder is unpickled or run.

    Args:
      path: the folder.
      dtype: of the parameters, "float32", "bfloat16" or "float16"; None keeps the files' own. What the model computes
        in is another matter: `config.dtype`, which is bfloat16 unless replaced.
      mesh: where the parameters go, split by the default `sharding.Rules`; the default device if None.

    Returns:
      The config as config.json gives it, with param_dtype set, and the parameters as `models.init` shapes them.

    Raises:
      InputError: in one line, on a config.json this package does not compute, on missing, unexpected or mis-shaped
        tensors, on dtypes it does not know, on files that are cut short, and where the mesh does not divide an axis.
    """
    source = Source(path, dtype)
    split = {}
    if mesh is not None:
        shapes = layouts.nested({entry.path: struct for entry, struct in source.rows})
        split = layouts.flat(sharding.tree_shardings(models.axes(source.config), shapes, sharding.Layout(mesh)))
    loaded = {}
    for entry, struct in sorted(source.rows, key=lambda row: -row[1].size):  # the largest while there is most room
        loaded[entry.path] = _place(source, entry, struct, split.get(entry.path))
    count = source.config.param_counts()["total"]
    logger.info("loaded %s: %d parameters as %s", source.folder, count, source.config.param_dtype)
    return source.config, layouts.nested(loaded)


def load_tables(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads what a checkpoint folder has of the vocabulary, onto the host: "embedding", and "head" if untied, [V, D].

    Raises:
      InputError: as `load` does.
    """
    source = Source(path)
    wanted = [(entry, struct) for entry, struct in source.rows if entry.path in ("embedding", "head")]
    return {entry.path: source.read(entry, (), tuple(map(range, struct.shape))) for entry, struct in wanted}


class Source:
    """A checkpoint folder whose tensors are known to be those of its config.

    Attributes:
      folder: where it is.
      config: what it is; param_dtype is what its parameters are to be.
      rows: (row of the layout, shape) of each parameter.

    Raises:
      InputError: as `load` does.
    """

    def __init__(self, path: str | os.PathLike, dtype: str | None = None):
        self.folder = pathlib.Path(path)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: is no folder; expected one with config.json and {files.SINGLE}")
        if dtype not in (None, *configs.DTYPES):
            raise InputError(f"dtype is {dtype!r}; expected None (keep the files') or {', '.join(configs.DTYPES)}")
        config, model_type = settings.read(self.folder)
        self._sizes, self._tensors = layouts.sizes(config), files.scan(self.folder)
        if config.num_hidden_layers > len(self._tensors):
            raise InputError(
                f"{self.folder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, and the files hold "
                f"{len(self._tensors)} tensors in all"
            )
        self.rows = layouts.table(model_type, config, models.abstract(config))
        expected = {name: entry.file_shape(config) for entry, _ in self.rows for name in entry.names(config)}
        head, embedding = (layouts.row(model_type, path) for path in ("head", "embedding"))
        twin = {}  # a tied checkpoint may hold the head once more
        if config.tie_word_embeddings and head.name in self._tensors:
            twin = {head.name: head.file_shape(config)}
        files.check(self.folder, self._tensors, expected | twin, layouts.IGNORED)
        self.config = config.replace(param_dtype=dtype or self._one_dtype(expected))
        for name in twin:
            self._refuse_unequal(name, embedding.name)

    def read(self, entry: Entry, place: tuple[int, ...], box: tuple[range, ...]) -> np.ndarray:
        """Reads one layer's (and expert's) part of a parameter.

        Args:
          entry: the parameter's row.
          place: index of the row's leading axes.
          box: range of each of our other axes.

        Returns:
          An array of the box's shape in config.param_dtype.

        Raises:
          InputError: where a value is too large for that dtype.
        """
        found, name = boxes.cut(entry, self._sizes, box), entry.tensor(place)
        values = boxes.to_ours(entry, found, self._tensors[name].read(found.slices))
        dtype = jnp.dtype(self.config.param_dtype)
        if values.dtype == dtype:
            return values
        with np.errstate(over="ignore"):
            cast = values.astype(dtype)
        if jnp.finfo(dtype).max < jnp.finfo(values.dtype).max and np.isinf(cast).sum() > np.isinf(values).sum():
            raise InputError(f"{self.folder}: {name} has values over {jnp.finfo(dtype).max}, the most {dtype} holds")
        return cast

    def _refuse_unequal(self, name: str, other: str) -> None:
        head, embedding = self._tensors[name], self._tensors[other]
        step = max(1, COMPARED_BYTES // (4 * head.shape[1]))
        for start in range(0, head.shape[0], step):
            rows = (slice(start, min(start + step, head.shape[0])), slice(0, head.shape[1]))
            if not np.array_equal(head.read(rows), embedding.read(rows)):
                raise InputError(
                    f"{self.folder}: tie_word_embeddings is true, but {name} is not {other}; say which is meant: "
                    f"set it to false in config.json, or take {name} out"
                )

    def _one_dtype(self, expected) -> str:
        """Returns the dtype that all tensors have."""
        kinds: dict[str, list[str]] = {}
        for name in expected:
            kinds.setdefault(files.DTYPES[self._tensors[name].dtype], []).append(name)
        if len(kinds) > 1:
            told = "; ".join(f"{kind}: {files.summary(names)}" for kind, names in kinds.items())
            raise InputError(
                f"{self.folder}: tensors are of several dtypes, say which one to load as (dtype=…). {told}"
            )
        return next(iter(kinds))


def _place(source: Source, entry: Entry, struct: jax.ShapeDtypeStruct, split: jax.sharding.Sharding | None):
    """Reads one parameter onto its devices; `split` None: onto the default device."""
    dtype = jnp.dtype(source.config.param_dtype)
    if split is None:
        return jax.device_put(_assemble(source, entry, tuple(range(size) for size in struct.shape), dtype))
    holders: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in split.addressable_devices_indices_map(struct.shape).items():
        box = tuple(range(*part.indices(size)) for part, size in zip(index, struct.shape, strict=True))
        holders.setdefault(box, []).append(device)
    arrays = []
    for box, devices in holders.items():  # replicas are read once
        part = _assemble(source, entry, box, dtype)
        arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(struct.shape, split, arrays)


def _assemble(source: Source, entry: Entry, box: tuple[range, ...], dtype: np.dtype) -> np.ndarray:
    """Reads a box of a parameter, tensor by tensor where it is stacked, in its final dtype."""
    out = _aligned([len(part) for part in box], dtype)
    leading, rest = box[: entry.leading], box[entry.leading :]
    for place in itertools.product(*leading):
        here = tuple(index - part.start for index, part in zip(place, leading, strict=True))
        out[here] = source.read(entry, place, rest)
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address from which JAX's CPU devices take the memory over instead of copying it."""
    bytes_needed = math.prod(shape) * dtype.itemsize
    room = np.empty(bytes_needed + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + bytes_needed].view(dtype).reshape(shape)
