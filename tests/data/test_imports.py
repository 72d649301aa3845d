"""Data workers are light: no accelerator library behind them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("data", ("numpy", "grain", "jax", "tensorflow", "tensorflow_datasets", "torch")),
        ("data.packing, qwen_jax.data.baseline, qwen_jax.data.packages", ("grain", "jax", "tensorflow", "torch")),
        ("data.chitchat", ("grain", "jax", "flax", "tensorflow", "torch")),
    ],
)
def test_what_importing_does_not_load(imported, absent, request):
    program = f"import sys, qwen_jax.{imported}; print(*(m for m in {absent!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=request.config.rootpath
    )
    assert result.stdout.split() == [], result.stderr
    assert result.returncode == 0, result.stderr


def test_an_unknown_module_is_named_with_the_known():
    import qwen_jax.data

    with pytest.raises(AttributeError, match="no attribute 'loaders'; its modules are .*loader"):
        qwen_jax.data.loaders  # noqa: B018
    assert qwen_jax.data.packing.__name__ == "qwen_jax.data.packing" and "packing" in dir(qwen_jax.data)
