"""Losses and advantages as pure functions of arrays: floats and masks in, (mean, metrics) out."""

from qwen_jax.objectives import balance, sft

__all__ = ["balance", "sft"]
