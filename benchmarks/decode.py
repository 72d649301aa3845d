"""Cached greedy decoding and prefill against transformers.generate: same weights, same prompts, same tokens.

    python benchmarks/decode.py [--runs 5] [--prompt 128] [--new 64] [--batches 1 8] [--one-core]

The CPU comparison configuration (hidden 512, 8 layers, 8 heads, 2 kv heads of 64, MLP 1408, 32,000 tokens, tied;
38.9 M parameters), float32. The sides take turns, so that a busy machine slows both; medians of the runs. --one-core
pins both to one core and counts CPU seconds: for a machine that others use, which hurts torch's threads the most.

Prefill is the time to the first token; decoding is what the other new - 1 tokens take beyond it. Prints one JSON
object: tokens per second, seconds of prefill, and ratios above 1 where this package is faster; {"skipped": reason}
where torch or transformers is not installed.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from qwen_jax import hf, models, rollout
from qwen_jax.config import QwenConfig

CONFIG = QwenConfig(
    vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip


def ours(params):
    """Returns a function (prompts, new) -> [N, new] tokens; the weights are laid out beforehand, as a server would."""
    prepared = rollout.prepare(CONFIG, params)

    def run(prompts, new):
        out = rollout.generate(CONFIG, prepared, prompts, jax.random.key(0), max_new_tokens=new, temperature=0)
        return np.asarray(out.tokens)

    return run


def theirs(params):
    """Returns the same function on transformers, with the weights of a folder that `hf.save` wrote."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        hf.save(folder, CONFIG, params)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(prompts, new):
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :].numpy()

    return run


def compare(sides: dict, batch: int, prompt: int, new: int, runs: int, clock) -> dict:
    """Returns the figures of one batch size."""
    prompts = np.random.default_rng(batch).integers(0, CONFIG.vocab_size, (batch, prompt)).tolist()
    seconds = {(name, tokens): [] for name in sides for tokens in (1, new)}
    agree = np.array_equal(*(run(prompts, new) for run in sides.values()))  # also compiles
    for _ in range(runs + 1):
        for (name, tokens), times in seconds.items():
            start = clock()
            sides[name](prompts, tokens)
            times.append(clock() - start)
    median = {which: statistics.median(times[1:]) for which, times in seconds.items()}  # the first warms up
    prefill = {name: median[name, 1] for name in sides}
    speed = {name: batch * (new - 1) / (median[name, new] - median[name, 1]) for name in sides}
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "same_tokens": bool(agree),
        "decode_tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "prefill_seconds": {name: round(value, 4) for name, value in prefill.items()},
        "decode_ratio": round(speed["qwen_jax"] / speed["transformers"], 2),
        "prefill_ratio": round(prefill["transformers"] / prefill["qwen_jax"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--one-core", action="store_true")
    flags = parser.parse_args()
    cores, clock = sorted(os.sched_getaffinity(0)), time.perf_counter
    if flags.one_core:  # before either library counts the cores
        cores, clock = cores[:1], time.process_time
        os.sched_setaffinity(0, cores)
    try:
        import torch
        import transformers
    except ImportError as error:
        print(json.dumps({"skipped": f"{error.name} is not installed"}))
        return
    torch.set_num_threads(len(cores))
    params = models.init(CONFIG, jax.random.key(0))
    sides = {"qwen_jax": ours(params), "transformers": theirs(params)}
    cases = [compare(sides, batch, flags.prompt, flags.new, flags.runs, clock) for batch in flags.batches]
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"cores": len(cores), "load": round(os.getloadavg()[0], 1), "clock": clock.__name__}
    print(json.dumps({"versions": versions, "machine": machine, "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
