"""One train step of this package against transformers + torch: tokens a second and peak memory; prints JSON ratios.

    python -m benchmarks.train_step [--runs 5] [--remat dots] [--scan-layers]

The CPU comparison configuration (hidden 512, 8 layers, 8 heads, 2 kv heads of 64, MLP 1408, 32,000 tokens, tied;
38.9 M parameters), float32, 4 rows of 512 tokens, AdamW with weight decay and the gradient clipped at norm 1. Both
sides start from the same weights and read the same batches; the losses of every step are compared, so that the same
work is known to be done.

Each side is a process of its own, with as many threads as there are cores, and they take their steps in turns, so that
a busy machine slows both. Tokens a second are of the median wall time; the CPU seconds of all threads
are given besides, which a busy machine changes less. Memory is the process's peak resident size as
the kernel counts it: "peak" over its whole life, importing and compiling included, "steps" from the first timed step
on. Speed ratios above 1 and memory ratios below 1 are in favour of this package. {"skipped": reason} without torch.
"""

import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SIDES = ("qwen_jax", "transformers")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        runs: pairs of timed steps.
        batch_size: rows.
        length: tokens in a row.
        remat: of qwen_jax: "dots" makes all but matrix products and attention again, which costs next to nothing;
            transformers keeps everything, its default.
        scan_layers: of qwen_jax.
    """

    runs: int = 5
    batch_size: int = 4
    length: int = 512
    remat: str = "dots"
    scan_layers: bool = True


def model_config(options: Options):
    """Returns the model of both sides."""
    from qwen_jax.config import QwenConfig

    return QwenConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, dtype="float32", remat=options.remat,
        scan_layers=options.scan_layers,
    )  # fmt: skip


def tokens_of(step: int, options: Options) -> np.ndarray:
    """Returns the ids of a step, [batch_size, length + 1]."""
    return np.random.default_rng(step).integers(0, 32_000, (options.batch_size, options.length + 1), np.int32)


def ours(folder: pathlib.Path, options: Options):
    """Returns a function step -> loss that trains the model of the folder."""
    import jax

    from experiments import sft
    from qwen_jax import hf, sharding
    from qwen_jax.batches import LMBatch
    from qwen_jax.training import heap
    from qwen_jax.training.loop import LoopConfig
    from qwen_jax.training.optimizer import OptimizerConfig

    adam = OptimizerConfig(peak_lr=LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)
    run = sft.Config(
        model_config(options), adam, LoopConfig(), length=options.length, batch_size=options.batch_size
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig())
    built = sft.build(run, mesh)
    train_step = built.train_step.lower(built.state, built.batch).compile()  # as the training loop does
    heap.release()
    held = {"state": built.start(hf.load(folder, mesh=mesh)[1], jax.random.key(0))}
    ones = np.ones((options.batch_size, options.length), np.int32)
    rest = (ones.astype(np.float32), ones, np.cumsum(ones, 1, np.int32) - 1)

    def step(number: int) -> float:
        ids = tokens_of(number, options)
        batch = sharding.put(LMBatch(ids[:, :-1], ids[:, 1:], *rest), built.batch)
        held["state"], metrics = train_step(held["state"], batch)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"])

    return step


def theirs(folder: pathlib.Path, options: Options):
    """Returns the same function on transformers and torch: its own loss, sdpa attention, fused AdamW."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step(number: int) -> float:
        ids = torch.from_numpy(tokens_of(number, options).astype(np.int64))
        adam.zero_grad()
        targets = ids[:, 1:].contiguous()
        loss = model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        return float(loss.detach())

    return step


def resident() -> int:
    """Returns this process's peak resident size in bytes since `forget_peak`."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    """Starts the peak anew."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def serve(side: str, folder: str, options: Options) -> None:
    """One side: a warm-up step, then one for each line read; prints its loss, seconds and memory as a line of JSON."""
    step = {"qwen_jax": ours, "transformers": theirs}[side](pathlib.Path(folder), options)
    said, sys.stdout = sys.stdout, sys.stderr
    for number, _ in enumerate(sys.stdin):
        start, cpu = time.perf_counter(), time.process_time()
        loss = step(number)
        seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, resident()
        if number == 0:
            forget_peak()
        print(json.dumps({"loss": loss, "seconds": seconds, "cpu": cpu, "peak": peak}), file=said, flush=True)


def main(options: Options) -> None:
    """Measures and prints."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(json.dumps({"skipped": f"{error.name} is not installed"}))
        return
    import jax

    from qwen_jax import hf, models

    command = [sys.executable, "-m", "benchmarks.train_step", "serve", json.dumps(dataclasses.asdict(options))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        config = model_config(options)
        hf.save(folder, config, models.init(config, jax.random.key(0)))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        sides = {name: subprocess.Popen([*command, name, str(folder)], **pipes) for name in SIDES}
        rows = {name: [] for name in SIDES}
        for _ in range(options.runs + 1):  # the first step warms up and, here, compiles
            for name, process in sides.items():
                print("step", file=process.stdin, flush=True)
                rows[name].append(json.loads(process.stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "cores": len(os.sched_getaffinity(0))} | figures(rows, options), indent=2))


def figures(rows: dict[str, list[dict]], options: Options) -> dict:
    """Returns what is printed of the steps of both sides."""
    timed = {name: [row["seconds"] for row in found[1:]] for name, found in rows.items()}
    seconds = {name: statistics.median(found) for name, found in timed.items()}
    cpu = {name: statistics.median(row["cpu"] for row in found[1:]) for name, found in rows.items()}
    life = {name: max(row["peak"] for row in found) for name, found in rows.items()}
    steps = {name: max(row["peak"] for row in found[1:]) for name, found in rows.items()}
    gap = [abs(a["loss"] - b["loss"]) for a, b in zip(*rows.values(), strict=True)]
    ratio = lambda of: round(of["qwen_jax"] / of["transformers"], 3)
    return {
        "options": dataclasses.asdict(options),
        "step_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens_per_second": {
            name: round(options.batch_size * options.length / value) for name, value in seconds.items()
        },
        "speed_ratio": round(1 / ratio(seconds), 3),
        "speed_ratio_of_each_pair": [round(b / a, 3) for a, b in zip(*timed.values(), strict=True)],
        "cpu_seconds": {name: round(value, 3) for name, value in cpu.items()},
        "cpu_speed_ratio": round(1 / ratio(cpu), 3),
        "peak_bytes": life,
        "peak_memory_ratio": ratio(life),
        "steps_bytes": steps,
        "steps_memory_ratio": ratio(steps),
        "largest_difference_of_losses": round(max(gap), 6),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[3], sys.argv[4], Options(**json.loads(sys.argv[2])))
    else:
        import tyro

        main(tyro.cli(Options, description=__doc__))
