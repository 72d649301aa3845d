"""A LoRA step against a full one: time, memory and FLOPs, on the CPU comparison model; prints JSON.

    python -m benchmarks.lora [--lora.rank 8] [--runs 5]

38.9 million parameters (hidden 512, 8 layers, vocabulary 32,000 tied), batch 4, length 512, AdamW. Steps of the two are
taken in turns, after one of each to warm up; figures are medians. Memory is what XLA plans for the compiled step:
state, frozen parameters, batch and everything temporary. FLOPs are counted by `train_flops_per_token`.
"""

import dataclasses
import json
import statistics
import time

import jax
import numpy as np
import tyro

from experiments import sft
from qwen_jax import models, sharding
from qwen_jax.batches import LMBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.training import throughput
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig

MODEL = QwenConfig(
    vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        lora: the adapters; of rank 8 on every kernel if not said otherwise.
        runs: pairs of steps.
        batch_size: rows.
        length: tokens in a row.
    """

    lora: LoraConfig = LoraConfig(rank=8)
    runs: int = 5
    batch_size: int = 4
    length: int = 512


def prepare(lora: LoraConfig, options: Options):
    """Returns a function that takes a step and returns its seconds (wall, CPU), and the step's memory in bytes."""
    run = sft.Config(
        model=MODEL, optimizer=OptimizerConfig(), loop=LoopConfig(), lora=lora, length=options.length,
        batch_size=options.batch_size,
    )  # fmt: skip
    built = sft.build(run, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    compiled = built.train_step.lower(built.state, built.batch, *built.frozen).compile()
    frozen = [models.init(MODEL, jax.random.key(0), mesh=built.layout.mesh)] if lora.rank else []
    held = {"state": built.init(jax.random.key(0), *frozen)}
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (options.batch_size, options.length + 1), np.int32)
    ones = np.ones((options.batch_size, options.length), np.int32)
    places = np.cumsum(ones, 1, np.int32) - 1
    batch = LMBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, places)
    batch = sharding.put(batch, built.batch)

    def step() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        held["state"], metrics = compiled(held["state"], batch, *frozen)
        jax.block_until_ready((held["state"], metrics))
        return time.perf_counter() - start, time.process_time() - cpu

    memory = compiled.memory_analysis()
    return step, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main(options: Options) -> None:
    """Measures and prints."""
    full, full_bytes = prepare(LoraConfig(), options)
    tuned, tuned_bytes = prepare(options.lora, options)
    full(), tuned()
    pairs = [(full(), tuned()) for _ in range(options.runs)]
    middle = lambda clock: [statistics.median(pair[which][clock] for pair in pairs) for which in (0, 1)]
    seconds, cpu = middle(0), middle(1)
    flops = [throughput.train_flops_per_token(MODEL, options.length, frozen=frozen) for frozen in (False, True)]
    result = {
        "jax": jax.__version__,
        "lora": dataclasses.asdict(options.lora),
        "full_step_seconds": round(seconds[0], 3),
        "lora_step_seconds": round(seconds[1], 3),
        "step_ratio": round(seconds[1] / seconds[0], 3),
        "step_ratio_of_each_pair": [round(tuned[0] / full[0], 3) for full, tuned in pairs],
        "cpu_seconds_ratio": round(cpu[1] / cpu[0], 3),  # hardly moved by what else the machine does
        "memory_ratio": round(tuned_bytes / full_bytes, 3),
        "full_bytes": full_bytes,
        "lora_bytes": tuned_bytes,
        "flops_ratio": round(flops[1] / flops[0], 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
