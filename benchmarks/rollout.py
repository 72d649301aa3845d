"""Continuous against static batching, on the answer lengths of real chats: the same samples, tokens per second.

    python -m benchmarks.rollout [--models quickstart comparison] [--slots 8 16] [--prompts 256] [--context 96]
                                 [--runs 3] [--whole]

Prompts are turns of the chats of data/chitchat, rendered by the quickstart's tokenizer (trained here), of
at most --context tokens; each is sampled as many tokens as the person's answer to it has, `<|im_end|>` counted, by
`max_new_tokens`: untrained weights of the quickstart's model (0.9M) or the CPU comparison configuration (38.9M) would
not stop by themselves. All sides pay for this the same. Sides, which take turns, medians of the runs:

  continuous   rollout.generate(..., slots=S)
  batches      rollout.generate on S prompts at a time, the static batch that needs as much memory
  whole        with --whole: rollout.generate on all prompts at once, memory for all

Prints one JSON object. "steps" is how often the model is run on one token of each row; its ratio to that of
"continuous" is what a machine would gain whose step costs the same whatever is in it, and which reads prompts for
nothing. Ratios above 1: continuous is faster, by wall clock and by CPU seconds.
"""

import argparse
import json
import os
import statistics
import time

import jax
import numpy as np

from benchmarks.decode import CONFIG as COMPARISON
from experiments import pretrain
from qwen_jax import models, rollout, tokenizer
from qwen_jax.data import sources

CONFIGS = {"quickstart": pretrain.small().model, "comparison": COMPARISON}
KEY = jax.random.key(0)
LONGEST = 512  # tokens of an answer; a few messages are pasted texts of thousands, more than the model reads


def turns(count: int, context: int) -> tuple[list[list[int]], list[int]]:
    """Returns one prompt from each of `count` chats, and the tokens of the answer that a person gave to it."""
    chats = list(sources.load("chitchat", "train"))
    vocab_size = CONFIGS["quickstart"].vocab_size
    tok = tokenizer.train((message["content"] for chat in chats for message in chat), vocab_size)
    draw, prompts, lengths = np.random.default_rng(0), [], []
    for chat in chats:
        if len(prompts) == count:
            break
        places = [i for i, message in enumerate(chat) if message["role"] == "assistant" and i]
        render = lambda end, chat=chat: tokenizer.chat.render(
            chat[:end], tok, generation="qwen2", add_generation_prompt=True
        )[0]
        fitting = [(i, ids) for i in places if len(ids := render(i)) <= context]
        if fitting:
            place, ids = fitting[draw.integers(len(fitting))]
            length = len(tok.encode(chat[place]["content"])) + 1
            if length <= LONGEST:
                prompts.append(ids)
                lengths.append(length)
    return prompts, lengths


def sides(config, prepared, prompts, lengths, slots: int) -> dict:
    """Returns functions () -> tokens [N, longest]."""
    longest = max(lengths)

    def run(first: int, last: int, **how):
        out = rollout.generate(
            config, prepared, prompts[first:last], KEY, max_new_tokens=lengths[first:last], first_row=first, **how
        )
        return np.pad(np.asarray(out.tokens), ((0, 0), (0, longest - out.tokens.shape[1])))

    N = len(prompts)
    return {
        "continuous": lambda: run(0, N, slots=slots),
        "batches": lambda: np.concatenate([run(first, first + slots) for first in range(0, N, slots)]),
        "whole": lambda: run(0, N),
    }


def steps(lengths: list[int], slots: int) -> dict[str, int]:
    """Returns how often each side runs the model on one token of each row."""
    ends = [0] * slots
    for length in lengths:
        first = ends.index(min(ends))
        ends[first] += length
    batches = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    return {"continuous": max(ends), "batches": batches, "whole": max(lengths)}


def compare(name: str, prompts, lengths, slots: int, runs: int, whole: bool) -> dict:
    """Returns the figures of one model and one number of slots."""
    config = CONFIGS[name]
    prepared = rollout.prepare(config, models.init(config, jax.random.key(1)))
    compared = sides(config, prepared, prompts, lengths, slots)
    if not whole:
        del compared["whole"]
    tokens = {side: run() for side, run in compared.items()}  # also compiles
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds = {side: {clock: [] for clock in clocks} for side in compared}
    for _ in range(runs):
        for side, run in compared.items():
            start = {clock: now() for clock, now in clocks.items()}
            run()
            for clock, now in clocks.items():
                seconds[side][clock].append(now() - start[clock])
    medians = {side: {clock: statistics.median(x) for clock, x in both.items()} for side, both in seconds.items()}
    others = [side for side in compared if side != "continuous"]
    ratio = {
        f"continuous_over_{side}": {
            clock: round(medians[side][clock] / medians["continuous"][clock], 2) for clock in clocks
        }
        for side in others
    }
    total, needed = sum(lengths), steps(lengths, slots)
    return {
        "model": name,
        "slots": slots,
        "same_tokens": all(np.array_equal(tokens["continuous"], tokens[side]) for side in others),
        "steps": needed,
        "steps_ratio": {side: round(needed[side] / needed["continuous"], 2) for side in others},
        "tokens_per_second": {
            side: {clock: round(total / medians[side][clock], 1) for clock in clocks} for side in compared
        },
        **ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=["quickstart", "comparison"])
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    flags = parser.parse_args()
    prompts, lengths = turns(flags.prompts, flags.context)
    found = {
        "prompts": len(prompts),
        "prompt_tokens_mean": round(statistics.mean(map(len, prompts)), 1),
        "answer_tokens": {
            "mean": round(statistics.mean(lengths), 1),
            "median": statistics.median(lengths),
            "ninth_decile": round(float(np.quantile(lengths, 0.9)), 1),
            "max": max(lengths),
            "max_over_mean": round(max(lengths) / statistics.mean(lengths), 2),
        },
    }
    cases = [
        compare(name, prompts, lengths, slots, flags.runs, flags.whole)
        for name in flags.models
        for slots in flags.slots
    ]
    machine = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "jax": jax.__version__}
    print(json.dumps({"machine": machine, "lengths": found, "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
