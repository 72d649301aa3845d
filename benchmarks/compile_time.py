"""Compile time by depth: 48 layers against 6, for a forward pass, a training step and sampling; prints JSON.

    python -m benchmarks.compile_time [--depths 6 48] [--runs 3]

Each figure is seconds from tracing to the end of compilation, the median of runs; nothing is run and nothing is read
from a compilation cache. Layers are scanned, so that the ratio should be near 1; sampling unrolls models of up to
`rollout.UNROLLED_LAYERS` layers, which decode faster for it.
"""

import dataclasses
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import tyro

from experiments import pretrain
from qwen_jax import models, rollout, sharding
from qwen_jax.config import QwenConfig
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig

WIDTH = QwenConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        depths: numbers of layers; ratios are of the last over the first.
        runs: how often each is compiled.
        length: tokens in a row.
    """

    depths: tuple[int, ...] = (6, 48)
    runs: int = 3
    length: int = 512


def forward(config: QwenConfig, length: int) -> None:
    """Compiles logits of 4 rows."""
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
    jax.jit(functools.partial(models.forward, config)).lower(models.abstract(config), tokens).compile()


def train_step(config: QwenConfig, length: int) -> None:
    """Compiles a step of pretraining."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    run = pretrain.Config(model=config, optimizer=OptimizerConfig(), loop=LoopConfig(), length=length, batch_size=4)
    built = pretrain.build(run, mesh)
    built.train_step.lower(built.state, built.batch).compile()


def generate(config: QwenConfig, length: int) -> None:
    """Compiles and runs the sampling of one token, all that its public face offers; the run itself is short."""
    params = models.init(config, jax.random.key(0))
    prepared = rollout.prepare(config, params)
    rollout.generate(config, prepared, [list(range(length // 8))], jax.random.key(0), max_new_tokens=2)


def seconds(compile_it, config: QwenConfig, options: Options) -> float:
    """Returns the median time of compiling anew."""
    times = []
    for _ in range(options.runs):
        jax.clear_caches()
        start = time.perf_counter()
        compile_it(config, options.length)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(options: Options) -> None:
    """Measures and prints."""
    jax.config.update("jax_enable_compilation_cache", False)
    result = {}
    for compile_it in (forward, train_step, generate):
        found = {
            depth: seconds(compile_it, WIDTH.replace(num_hidden_layers=depth), options) for depth in options.depths
        }
        result[compile_it.__name__] = {
            "seconds_by_layers": {depth: round(value, 2) for depth, value in found.items()},
            "ratio": round(found[options.depths[-1]] / found[options.depths[0]], 2),
        }
    print(json.dumps({"jax": jax.__version__, **result}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
