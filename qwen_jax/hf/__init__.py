"""Published checkpoints in and out: a Hugging Face folder (config.json + safetensors) to a parameter tree and back.

config, params = hf.load("Qwen2-0.5B", dtype="float32", mesh=mesh)
hf.save("my-qwen2", config, params)
"""

from qwen_jax.hf.loading import load
from qwen_jax.hf.saving import save
from qwen_jax.hf.settings import read_config

__all__ = ["load", "read_config", "save"]
