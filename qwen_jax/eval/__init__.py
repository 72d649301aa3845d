"""Finished models on the tasks of lm-evaluation-harness: python -m qwen_jax.eval --checkpoint DIR --tasks NAMES

The harness (`pip install 'qwen_jax[eval]'`) is loaded by the command alone; `HarnessModel` answers its requests
without it.
"""

from qwen_jax.eval.harness import HarnessModel

__all__ = ["HarnessModel"]
