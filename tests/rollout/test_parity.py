"""Greedy answers equal those of transformers, token for token; skipped where torch or transformers is not installed."""

import jax
import numpy as np
import pytest

from qwen_jax import hf, models, rollout
from tests.conftest import tiny

torch = pytest.importorskip("torch", reason="parity needs torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which is not installed")

NEW = 12
MODELS = {
    "qwen2": tiny(tie_word_embeddings=False, num_attention_heads=6, hidden_size=96),
    "qwen3": tiny(tie_word_embeddings=False, qkv_bias=False, qk_norm=True, hidden_size=48),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_to_100_random_prompts_are_those_of_transformers(name, tmp_path):
    config = MODELS[name]
    draw = np.random.default_rng(5)
    params = jax.tree.map(lambda x: draw.normal(0.02, 0.15, x.shape).astype(np.float32), models.abstract(config))
    prompts = [draw.integers(0, config.vocab_size, length).tolist() for length in draw.integers(1, 40, 100)]
    ours = rollout.generate(config, params, prompts, jax.random.key(0), max_new_tokens=NEW, temperature=0)
    hf.save(tmp_path / "model", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [
            theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]  # fmt: skip
    assert np.asarray(ours.tokens).tolist() == expected
    assert len({tuple(row) for row in expected}) > 50  # not one answer to everything
