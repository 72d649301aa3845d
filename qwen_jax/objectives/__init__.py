"""Losses and advantages as pure functions of arrays: floats and masks in, (mean, metrics) out."""

from qwen_jax.objectives import balance, divergence, grpo, ppo, router_use, sft

__all__ = ["balance", "divergence", "grpo", "ppo", "router_use", "sft"]
