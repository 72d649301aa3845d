"""Qwen models: Flax modules that own parameters, and the functions that users call."""

from qwen_jax.models import answers, lora
from qwen_jax.models.decoder import Decoder, KVCache, head
from qwen_jax.models.functional import (
    abstract,
    axes,
    forward,
    hidden_states,
    init,
    log_probs,
    log_probs_and_routing,
    logits,
    placed,
    scores,
    sequence_log_probs,
    with_score_head,
)
from qwen_jax.models.fused import fuse, fused_axes
from qwen_jax.models.upcycling import upcycle

__all__ = [
    "Decoder",
    "KVCache",
    "abstract",
    "answers",
    "axes",
    "forward",
    "fuse",
    "fused_axes",
    "head",
    "hidden_states",
    "init",
    "log_probs",
    "log_probs_and_routing",
    "logits",
    "lora",
    "placed",
    "scores",
    "sequence_log_probs",
    "upcycle",
    "with_score_head",
]
