"""Published checkpoints in and out: a Hugging Face folder (config.json + safetensors) to a parameter tree and back.

config, params = hf.load("Qwen2-0.5B", dtype="float32", mesh=mesh)
hf.save("my-qwen2", config, params)
adapter = hf.load_adapter("a-peft-folder", config)     # adapter.join(params) or adapter.merge(params)
"""

from qwen_jax.hf.adapters import Adapter, load_adapter, save_adapter
from qwen_jax.hf.loading import load, load_tables
from qwen_jax.hf.saving import save
from qwen_jax.hf.settings import read_config

__all__ = ["Adapter", "load", "load_adapter", "load_tables", "read_config", "save", "save_adapter"]
