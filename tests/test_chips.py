"""Published peaks by device kind."""

from types import SimpleNamespace

import jax
import pytest

from metaembed_jax.chips import peak
from metaembed_jax.planning.topology import topology

TERA, GIGA = 1e12, 1e9


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_planned_tpu_has_the_peaks_of_its_chip(name):
    slices = topology(name)
    peaks, chip = peak(slices.devices[0]), slices.chip
    assert peaks.flops * chip.devices == chip.flops and peaks.hbm_bytes * chip.devices == chip.hbm_bytes


@pytest.mark.parametrize(
    "kind, flops, bandwidth, size",
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1555, 40),
        ("NVIDIA A100-SXM4-80GB", 312, 2039, 80),
        ("NVIDIA A100 80GB PCIe", 312, 1935, 80),
        ("NVIDIA H100 80GB HBM3", 989.5, 3350, 80),
        ("NVIDIA H100 PCIe", 756.5, 2000, 80),
        ("NVIDIA H200", 989.5, 4800, 141),
        ("NVIDIA L4", 121, 300, 24),
        ("Tesla T4", 65, 320, 16),
        ("NVIDIA A10G", 70, 600, 24),
        ("NVIDIA B200", 2250, 8000, 180),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008, 24),
    ],
)
def test_nvidia_cards_have_their_peaks(kind, flops, bandwidth, size):
    peaks = peak(SimpleNamespace(device_kind=kind))
    assert (peaks.flops / TERA, peaks.hbm_bandwidth / GIGA, peaks.hbm_bytes / GIGA) == (flops, bandwidth, size)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA GeForce RTX 4080", "TPU v2"])
def test_unknown_devices_have_no_peaks(kind):
    assert peak(SimpleNamespace(device_kind=kind)) is None
    assert peak(jax.devices()[0]) is None
