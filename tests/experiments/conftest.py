"""What tests of whole runs share."""

import jax
import pytest

from qwen_jax import sharding


@pytest.fixture
def one_device(monkeypatch):
    """Runs that name no mesh take one device: collectives of 8 virtual ones cost most of a small run.

    Meshes are compared with one device in test_recipes.py and in tests/training/test_reinforce.py.
    """
    monkeypatch.setattr(sharding.jax, "devices", lambda: [jax.local_devices()[0]])
