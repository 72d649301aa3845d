"""Rewrites a checkpoint folder: another dtype, other file sizes, Qwen v1 into the qwen2 layout, a LoRA adapter added.

python -m qwen_jax.hf.convert SRC DST --dtype bfloat16 --shard-bytes 2000000000

SRC is a Hugging Face folder (config.json + safetensors); a run's workdir is turned into one by
python -m qwen_jax.training.export. One tensor is in memory at a time, and no device is used but to add an adapter.
"""

import pathlib
import sys
from typing import Literal

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.hf import adapters, files, layouts, loading, saving, settings
from qwen_jax.hf.layouts import Entry
from qwen_jax.ops import lora

# What a model needs beside its weights. No code: v1's tokenization_*.py stays behind.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "qwen.tiktoken", "generation_config.json", "LICENSE",
)  # fmt: skip
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json: generation reads them


def convert(
    src: pathlib.Path,
    dst: pathlib.Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = saving.SHARD_BYTES,
    adapter: pathlib.Path | None = None,
) -> None:
    """Writes the model of `src` to `dst` in the qwen2 or qwen3 layout, with its tokenizer files.

    Args:
      src: a folder that `load` reads.
      dst: as the target of `save`.
      dtype: of the tensors; None keeps them.
      shard_bytes: as in `save`.
      adapter: a peft folder, merged in; the sums are in float32.

    Raises:
      InputError: as `load` and `save` do.
    """
    source = loading.Source(src, dtype)
    sizes = layouts.sizes(source.config)
    added = None if adapter is None else _adding(adapters.load_adapter(adapter, source.config))
    origin = {entry.path: entry for entry, _ in source.rows}

    def fetch(entry: Entry, place: tuple[int, ...]) -> np.ndarray:
        whole = tuple(range(sizes[letter]) for letter in entry.ours)
        kept = source.read(origin[entry.path], place, whole)
        return kept if added is None else added(entry, place, kept).astype(kept.dtype)

    saving.write(
        dst,
        source.config,
        source.config.param_dtype,
        fetch,
        shard_bytes,
        fields=_fields(source),
        drop=COMPANIONS,  # those of another model must not stand beside these weights
        companions=tuple(source.folder / name for name in COMPANIONS if (source.folder / name).is_file()),
    )


def _adding(adapter: adapters.Adapter):
    """Returns (row, place, parameter) -> the parameter with the adapter added, in float32 where it has a part in it."""
    leaves = layouts.flat(adapter.tree)
    factor = lora.scale(adapter.lora.rank, adapter.lora.alpha, rslora=adapter.lora.rslora)

    def add(entry: Entry, place: tuple[int, ...], kept: np.ndarray) -> np.ndarray:
        if f"rows/{entry.path}" in leaves:
            whole = kept.astype(np.float32)
            whole[list(adapter.lora.row_ids)] = leaves[f"rows/{entry.path}"]
            return whole
        if entry.path == "score":
            return np.asarray(leaves["score"]) if "score" in leaves else kept
        path = entry.path.removesuffix("/kernel")
        parts = {name: leaves[f"{path}/{name}"][place] for name in lora.ADAPTER if f"{path}/{name}" in leaves}
        if not parts or path == entry.path:
            return kept
        return np.asarray(lora.merge_kernel(kept.astype(np.float32), parts | {"b": parts["b"] * factor}))

    return add


def _fields(source: loading.Source) -> dict:
    """The source's own config.json but for the dtype, so that what we do not read is kept; a new one for v1."""
    dtype, kept = source.config.param_dtype, files.read_json(source.folder / "config.json")
    if kept["model_type"] == "qwen":
        return settings.write(source.config, dtype) | {name: kept[name] for name in TOKEN_FIELDS if name in kept}
    spelled = [name for name in ("dtype", "torch_dtype") if name in kept] or ["torch_dtype"]
    return kept | dict.fromkeys(spelled, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    import tyro

    def command(
        src: tyro.conf.Positional[pathlib.Path],
        dst: tyro.conf.Positional[pathlib.Path],
        /,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        shard_bytes: int = saving.SHARD_BYTES,
        adapter: pathlib.Path | None = None,
    ) -> None:
        """Rewrites a Hugging Face checkpoint folder.

        Args:
            src: Folder with config.json and safetensors (of a run's workdir qwen_jax.training.export makes one).
            dst: Folder to write; a checkpoint that is there is replaced.
            dtype: Of the tensors; as they are if not given.
            shard_bytes: Largest size of one file of tensors.
            adapter: Folder of a peft LoRA adapter to merge in.
        """
        convert(src, dst, dtype=dtype, shard_bytes=shard_bytes, adapter=adapter)
        print(f"wrote {dst}")

    try:
        tyro.cli(command, prog="python -m qwen_jax.hf.convert", args=arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
