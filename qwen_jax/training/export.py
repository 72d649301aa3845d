"""Writes what a run has trained as a Hugging Face folder, its tokenizer with it; LoRA adapters are added to their base.

python -m qwen_jax.training.export WORKDIR DST --dtype bfloat16
"""

import logging
import pathlib
import sys
from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax import hf, tokenizer
from qwen_jax.errors import InputError
from qwen_jax.training import pretrained


def export(source: pathlib.Path, dst: pathlib.Path, *, dtype: str = "float32") -> None:
    """Writes the model of a run's newest checkpoint: config.json, safetensors and the tokenizer's files.

    Args:
      source: the run's workdir.
      dst: as the target of `hf.save`.
      dtype: of the tensors.

    Raises:
      InputError: where the folder is no run, has no checkpoint yet, or its base cannot be read.
    """
    if not pretrained.is_run(source):
        raise InputError(f"{source} is a Hugging Face folder already; python -m qwen_jax.hf.convert rewrites those")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), pretrained.load_params(source))
    hf.save(dst, pretrained.read_config(source), params)
    tokenizer.load(pretrained.tokenizer_path(source)).save(dst)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    import tyro

    def command(
        source: tyro.conf.Positional[pathlib.Path],
        dst: tyro.conf.Positional[pathlib.Path],
        /,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        """Writes what a run has trained as a Hugging Face folder.

        Args:
            source: Workdir of a run; of a LoRA run the adapters are added to the base.
            dst: Folder to write; a checkpoint that is there is replaced.
            dtype: Of the tensors.
        """
        export(source, dst, dtype=dtype)
        print(f"wrote {dst}")

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of each of its steps
    try:
        tyro.cli(command, prog="python -m qwen_jax.training.export", args=arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
