"""Qwen models: Flax modules that own parameters, and the functions that users call."""

from qwen_jax.models.decoder import Decoder, KVCache, head
from qwen_jax.models.functional import abstract, axes, forward, hidden_states, init, log_probs, sequence_log_probs

__all__ = [
    "Decoder",
    "KVCache",
    "abstract",
    "axes",
    "forward",
    "head",
    "hidden_states",
    "init",
    "log_probs",
    "sequence_log_probs",
]
