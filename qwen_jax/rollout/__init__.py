"""Sampling with a KV cache.

answers = rollout.generate(config, params, prompts, key, max_new_tokens=64, stop_ids=[end], num_tokens=tok.vocab_size)
"""

from qwen_jax.rollout.generation import DECODE_RULES, Completions, Prepared, generate, prepare, stream

__all__ = ["DECODE_RULES", "Completions", "Prepared", "generate", "prepare", "stream"]
