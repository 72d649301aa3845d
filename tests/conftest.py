"""What every test runs under: 8 virtual CPU devices, float32, strict broadcasting, one compilation cache."""

import os
import pathlib

from tests.hosts import FAST_COMPILE

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILE}"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile far more than they compute
os.environ["JAX_PLATFORMS"] = "cpu"
# The workers, the programs they start and the next run compile the same small steps: each is compiled once, and even
# the smallest takes a third of the time to read. The cache's key is the whole program, jaxlib's version and the flags,
# so a change is never met by an old executable.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

from qwen_jax import config, sharding

jax.config.update("jax_numpy_rank_promotion", "raise")

# Three ways to cut 8 devices that together split every axis a dense model has.
MESHES = {
    "fsdp8": sharding.MeshConfig(fsdp=8),
    "data2-fsdp2-tensor2": sharding.MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp2-context2-tensor2": sharding.MeshConfig(fsdp=2, context=2, tensor=2),
}


@pytest.fixture(params=MESHES)
def mesh(request):
    """Each of MESHES in turn."""
    return sharding.make_mesh(MESHES[request.param])


def tiny(**fields) -> config.QwenConfig:
    """A Qwen2-style model small enough to compile in a second and even enough for every mesh of MESHES."""
    small = dict(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, dtype="float32",
    )  # fmt: skip
    return config.get("qwen2-0.5b").replace(**{**small, **fields})


FAMILIES = {
    "qwen2-tied": tiny(),
    "qwen2-untied": tiny(tie_word_embeddings=False),
    "qwen3": tiny(
        tie_word_embeddings=False, qkv_bias=False, qk_norm=True, hidden_size=48
    ),  # heads * head_dim != hidden
}


EXPERTS = dict(tie_word_embeddings=False, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
MOE_FAMILIES = {
    "qwen2-moe": tiny(**EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": tiny(**EXPERTS, qkv_bias=False, qk_norm=True, norm_topk_prob=True),
    "qwen3-moe-some-dense": tiny(
        **EXPERTS, qkv_bias=False, qk_norm=True, norm_topk_prob=True, num_hidden_layers=5, decoder_sparse_step=2
    ),  # dense, experts, dense, experts, dense: a scanned pattern and a layer
    "qwen2-moe-first-dense": tiny(
        **EXPERTS, shared_expert_intermediate_size=24, num_hidden_layers=3, mlp_only_layers=(0,)
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A tiny config of each family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(params=zip(FAMILIES, MESHES, strict=True), ids="-on-".join)
def family_on_mesh(request):
    """Each family and each mesh once, in pairs: what a mesh changes and what a family changes do not meet."""
    family, mesh = request.param
    return FAMILIES[family], sharding.make_mesh(MESHES[mesh])
