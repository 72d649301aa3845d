"""What the sampler says of its tokens is what the trainer says: the ratio of a first update is 1 by construction.

Both run the same layers; they differ in the order of sums (a cache read token by token, fused kernels, adapters merged
into their kernels). TOLERANCE is for float32; 3e-6 was the largest gap seen. The sharp long-context models, whose
queries and keys are six times as large, get five times that (1e-5 seen), bfloat16 0.1 (0.02 seen, 0.005 in the mean).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import models, rollout
from qwen_jax.config import DualChunk, LoraConfig, V1Lengths
from tests.conftest import EXPERTS, tiny
from tests.models.test_long_context import sharp, small
from tests.rollout.test_generate import perturbed, some_prompts

TOLERANCE = 2e-5  # nats a token
PROMPTS = some_prompts((3, 21, 12, 1, 17))
LORA = LoraConfig(rank=4, alpha=8.0)


def adapted(config):
    """Parameters joined with adapters that change what is said."""
    params = perturbed(config)
    drawn = lambda i, x: 0.3 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
    leaves, tree = jax.tree.flatten(models.lora.abstract(config, LORA))
    return models.lora.join(params, tree.unflatten([drawn(i, x) for i, x in enumerate(leaves)]), LORA)


ONE = dict(num_hidden_layers=1, tie_word_embeddings=False)
EXPERT = tiny(**ONE | EXPERTS, shared_expert_intermediate_size=24)
MODELS = {
    "dense": (tiny(**ONE), perturbed, TOLERANCE),
    "experts": (EXPERT, perturbed, TOLERANCE),
    "adapters": (tiny(**ONE), adapted, TOLERANCE),
    "dual chunks": (small(num_hidden_layers=1, dual_chunk=DualChunk(10, 4, 10)), sharp, 5 * TOLERANCE),
    "dynamic NTK": (small(num_hidden_layers=1, v1_lengths=V1Lengths(8, True, True)), sharp, 5 * TOLERANCE),
    "bfloat16": (tiny(**ONE, dtype="bfloat16"), perturbed, 0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_samplers_log_probs_are_the_trainers(name):
    """Under the sampling of RL: filtered, several samples of a prompt, more answers than rows."""
    config, make, tolerance = MODELS[name]
    params, new = make(config), 12
    how = dict(max_new_tokens=new, samples=2, slots=4, temperature=0.8, top_k=30, stop_ids=range(5, 256, 20), piece=12)
    out = rollout.Completions(*map(np.asarray, rollout.generate(config, params, PROMPTS, jax.random.key(0), **how)))
    rows = np.zeros((2 * len(PROMPTS), max(map(len, PROMPTS)) + new), np.int32)
    seen, prompts = np.zeros_like(rows), np.zeros_like(rows)
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(2)):
        ids = [*prompt, *out.tokens[row, : out.lengths[row]]]
        rows[row, : len(ids)], seen[row, : len(ids)], prompts[row] = ids, 1, len(prompt)
    trained = models.sequence_log_probs(
        config, params, jnp.asarray(rows), segment_ids=jnp.asarray(seen), prompt_lengths=jnp.asarray(prompts)
    )
    gaps = [
        np.abs(out.log_probs[row, :length] - np.asarray(trained[row, start - 1 : start - 1 + length]))
        for row, (length, start) in enumerate(zip(out.lengths, prompts[:, 0], strict=True))
    ]
    assert 0 < sum(map(len, gaps)) == out.lengths.sum()
    assert max(map(np.max, gaps)) < tolerance, (max(map(np.max, gaps)), np.mean(np.concatenate(gaps)))
