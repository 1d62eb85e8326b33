"""Peaks by the names that devices give themselves."""

from types import SimpleNamespace

import jax
import pytest

from metaembed_jax.planning.chips import topology
from metaembed_jax.planning.peaks import peak

TERA, GIGA = 1e12, 1e9


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_tpu_that_can_be_planned_for_has_the_peaks_of_its_chip(name):
    slice_ = topology(name)
    found = peak(slice_.devices[0])
    assert found.flops * slice_.chip.devices == slice_.chip.flops
    assert found.hbm_bytes * slice_.chip.devices == slice_.chip.hbm_bytes


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
def test_cards_of_nvidia(kind, flops, bandwidth, size):
    found = peak(SimpleNamespace(device_kind=kind))
    assert (found.flops / TERA, found.hbm_bandwidth / GIGA, found.hbm_bytes / GIGA) == (flops, bandwidth, size)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA GeForce RTX 4080", "TPU v2"])
def test_others_are_not_guessed(kind):
    assert peak(SimpleNamespace(device_kind=kind)) is None
    assert peak(jax.devices()[0]) is None
