"""The peak that utilisation is measured against, by kind and number of devices."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.training import throughput


def mesh_of(count, **device):
    """What peak_flops reads of a mesh: its devices' kind and platform."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(**device)] * count, dtype=object).reshape(count, 1))


@pytest.fixture
def measured(monkeypatch):
    """One measured product: 1 TFLOP/s; records the type it was asked for."""
    asked = []
    monkeypatch.setattr(throughput, "_measured", lambda dtype, size: asked.append(np.dtype(dtype).name) or 1e12)
    return asked


@pytest.mark.parametrize(
    "kind, peak", [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12)]
)
def test_published_peaks_are_of_all_devices(kind, peak, measured):
    assert throughput.peak_flops(mesh_of(16, device_kind=kind, platform="any"))[0] == 16 * peak
    assert not measured


def test_an_unknown_accelerator_is_measured_and_counts_as_often_as_there_are(measured):
    peak, source = throughput.peak_flops(mesh_of(4, device_kind="Made-up X1", platform="gpu"))
    assert peak == 4e12
    assert "4 x Made-up X1, measured" in source
    assert measured == ["bfloat16"]


def test_the_virtual_devices_of_a_cpu_share_it(measured):
    alone, all_eight = (sharding.make_mesh(devices=jax.devices()[:count]) for count in (1, 8))
    assert throughput.peak_flops(alone)[0] == throughput.peak_flops(all_eight)[0] == 1e12
    assert measured == ["float32"] * 2


def test_a_measurement_is_a_rate():
    """Far below and above any machine: that seconds and FLOPs were not swapped or lost."""
    assert 1e7 < throughput._measured(np.float32, 256) < 1e16
