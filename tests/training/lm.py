"""A tiny language model and made-up rows, for the tests of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pretrain import language_model_loss
from qwen_jax import models
from qwen_jax.batches import LMBatch
from qwen_jax.sharding import Layout
from qwen_jax.training import optimizer, program
from qwen_jax.training.optimizer import OptimizerConfig
from tests.conftest import tiny

MODEL = tiny()

# Adam divides by |gradient| + eps: with the usual 1e-8 an entry whose gradient is near zero turns a last-digit
# difference into one of the size of the learning rate, and comparing two ways to compute a step would say nothing.
SMOOTH = OptimizerConfig(peak_lr=1e-2, warmup_steps=2, eps=1e-3)


def batch(rows=8, length=16, seed=0) -> LMBatch:
    """Rows whose masks have very different numbers of learned tokens; the last row has none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (rows, length + 1)).astype(np.int32)
    learned = np.arange(length) < rng.integers(1, length, rows)[:, None]
    learned[-1] = False
    ones = np.ones((rows, length), np.int32)
    return LMBatch(tokens[:, :-1], tokens[:, 1:], learned.astype(np.float32), ones, np.cumsum(ones, 1, np.int32) - 1)


def build(mesh, *, microbatches=1, rows=8, steps=20, loss_fn=None, config=SMOOTH) -> program.Program:
    """The program of a tiny run on a mesh."""
    layout = Layout(mesh)
    return program.build(
        init_params=functools.partial(models.init, MODEL),
        param_axes=models.axes(MODEL),
        loss_fn=loss_fn or functools.partial(language_model_loss, model=MODEL, layout=layout),
        tx=optimizer.make(config, steps),
        batch=jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch(rows))),
        layout=layout,
        microbatches=microbatches,
    )
