"""A training run in a process of its own, for the tests that kill it.

python -m tests.training.interrupted_run DIR STEPS
"""

import dataclasses
import sys

import jax

from experiments import pretrain
from qwen_jax.training.loop import LoopConfig

jax.config.update("jax_disable_most_optimizations", True)

if __name__ == "__main__":
    folder, steps = sys.argv[1], int(sys.argv[2])
    smoke = pretrain.smoke()
    config = dataclasses.replace(
        smoke, loop=LoopConfig(steps=steps, log_every=1, eval_every=4, checkpoint_every=4), microbatches=2
    )
    pretrain.run(config, folder, "interrupted")
