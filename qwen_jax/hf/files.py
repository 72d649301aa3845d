"""The safetensors files of a folder: what they hold, whether that is the model, and reads of a part of a tensor.

Only safetensors is read. A pickle (pytorch_model.bin) can run code when it is opened, so it never is.
"""

import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

from qwen_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors name -> ours
CODES = {name: code for code, name in DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor lies and what its file's header says of it."""

    file: pathlib.Path
    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Copies a part of the tensor out of the file; only its pages are read.

        The file is mapped for the length of this call: pages that stay mapped count as this process's memory.
        """
        from safetensors import safe_open

        with safe_open(self.file, "np") as opened:
            return opened.get_slice(self.name)[slices]


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object.

    Raises:
      InputError: where the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def scan(folder: pathlib.Path) -> dict[str, Tensor]:
    """Reads the headers of the folder's weights.

    Returns:
      {name: Tensor}.

    Raises:
      InputError: no safetensors, a file of the index is missing, or a header does not fit its file.
    """
    if (folder / SINGLE).is_file():
        return {tensor.name: tensor for tensor in headers(folder / SINGLE)}
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: {_what_instead(folder)}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{folder / INDEX}: has no weight_map")
    shards = sorted({str(file) for file in places.values()})
    outside = [file for file in shards if file in ("", "..") or pathlib.PurePath(file).name != file]
    if outside:
        raise InputError(f"{folder / INDEX}: names files outside the folder: {', '.join(outside)}")
    absent = [file for file in shards if not (folder / file).is_file()]
    if absent:
        raise InputError(
            f"{folder}: {len(absent)} of {len(shards)} files of the index are missing: {', '.join(absent)}"
        )
    found = [tensor for file in shards for tensor in headers(folder / file)]
    return {tensor.name: tensor for tensor in found if places.get(tensor.name, tensor.file.name) == tensor.file.name}


def headers(file: pathlib.Path) -> list[Tensor]:
    """Reads what one safetensors file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 (not a dict)
            return [Tensor(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise InputError(f"{file}: is no whole safetensors file of {size} bytes, download it again ({error})") from None


def _what_instead(folder: pathlib.Path) -> str:
    """Says why a folder without weights that we read has none."""
    found = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in found if re.fullmatch(r"pytorch_model.*\.(bin|bin\.index\.json)|.*\.(pt|pth)", name)]
    if pickles:
        return (
            f"holds pickled weights only ({pickles[0]}), never opened because they can run code; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST) in transformers"
        )
    parts = [name for name in found if name.endswith(".safetensors")]
    if parts:
        return f"holds {', '.join(parts[:3])} but neither {SINGLE} nor {INDEX}: the download is not whole"
    return f"holds no {SINGLE} and no {INDEX}; found {', '.join(found[:8]) or 'nothing'}"


def check(folder: pathlib.Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], ignored: str) -> None:
    """Compares what the files hold with what the model needs.

    Args:
      folder: for the message.
      tensors: what `scan` found.
      expected: {name: shape} of the model.
      ignored: pattern of names that may be there and are not read.

    Raises:
      InputError: on missing, unexpected or mis-shaped tensors or foreign dtypes; one line names them all.
    """
    spare = {name for name in tensors if name not in expected and not re.fullmatch(ignored, name)}
    here = {name: tensors[name] for name in expected if name in tensors}
    shapes = [
        f"{name} is {list(tensor.shape)}, config.json says {list(expected[name])}"
        for name, tensor in here.items()
        if tensor.shape != expected[name]
    ]
    dtypes = [f"{name} ({tensor.dtype})" for name, tensor in here.items() if tensor.dtype not in DTYPES]
    problems = {
        "missing": summary([name for name in expected if name not in tensors]),
        "unexpected": summary(spare),
        "wrong shape": "; ".join(shapes[:8]) + (f"; and {len(shapes) - 8} more" if len(shapes) > 8 else ""),
        f"of a dtype other than {', '.join(DTYPES)}": summary(dtypes),
    }
    told = [f"{what}: {which}" for what, which in problems.items() if which]
    if told:
        raise InputError(f"{folder}: the tensors are not those of its config.json. {'. '.join(told)}")


def summary(names) -> str:
    """Joins tensor names, those that differ in the layer only as one: "model.layers.{0-23}.input_layernorm.weight"."""
    layers: dict[str, list[int]] = {}
    for name in sorted(names):
        match = re.search(r"\.(\d+)\.", name)
        key = name[: match.start(1)] + "{}" + name[match.end(1) :] if match else name
        layers.setdefault(key, []).extend([int(match.group(1))] if match else [])
    return ", ".join(key.replace("{}", _ranges(found)) if found else key for key, found in layers.items())


def _ranges(numbers: list[int]) -> str:
    """Writes [0, 1, 2, 5] as "{0-2,5}" and [5] as "5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
