"""Losses and advantages as pure functions of arrays: floats and masks in, (mean, metrics) out."""

from qwen_jax.objectives import balance, divergence, dpo, grpo, ppo, reward, router_use, sft

__all__ = ["balance", "divergence", "dpo", "grpo", "ppo", "reward", "router_use", "sft"]
