"""Published peaks of TPUs and NVIDIA cards by the names that JAX gives them: bfloat16 FLOP/s, memory and its bandwidth."""

from typing import NamedTuple

import jax

from metaembed_jax.planning.chips import CHIPS


class Peak(NamedTuple):
    """The peaks of one device of JAX; a TPU v7x chip is two devices.

    Attributes:
      flops: dense bfloat16 operations a second.
      hbm_bandwidth: bytes a second between memory and cores.
      hbm_bytes: memory.
      source: of the figures.
    """

    flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    source: str


# Each `Device.device_kind` that JAX has used for a TPU, and the chip that it is.
TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# Words of a card's `device_kind`, special cases before general ones; a card that names no form factor is SXM. Most figures of
# NVIDIA's are for sparse products, which doubles them: these are the halves, for dense products.
CARDS = (
    (("B200",), Peak(2250e12, 8000e9, 180e9, NVIDIA + "hgx")),
    (("H200", "NVL"), Peak(835.5e12, 4800e9, 141e9, NVIDIA + "h200")),
    (("H200",), Peak(989.5e12, 4800e9, 141e9, NVIDIA + "h200")),
    (("H100", "NVL"), Peak(835.5e12, 3900e9, 94e9, NVIDIA + "h100")),
    (("H100", "PCIe"), Peak(756.5e12, 2000e9, 80e9, NVIDIA + "h100")),
    (("H100",), Peak(989.5e12, 3350e9, 80e9, NVIDIA + "h100")),
    (("A100", "80GB", "PCIe"), Peak(312e12, 1935e9, 80e9, NVIDIA + "a100")),
    (("A100", "80GB"), Peak(312e12, 2039e9, 80e9, NVIDIA + "a100")),
    (("A100",), Peak(312e12, 1555e9, 40e9, NVIDIA + "a100")),
    (("L4",), Peak(121e12, 300e9, 24e9, NVIDIA + "l4")),
    # Made for Amazon, which publishes the bandwidth. It has half the tensor operations a second of NVIDIA's A10.
    (("A10G",), Peak(70e12, 600e9, 24e9, "https://aws.amazon.com/ec2/instance-types/g5/")),
    # It has no bfloat16 units: the figure is for float16.
    (("T4",), Peak(65e12, 320e9, 16e9, NVIDIA + "tesla-t4")),
    (
        ("RTX", "4090"),
        Peak(165.2e12, 1008e9, 24e9, "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    ),
)


def peak(device: jax.Device) -> Peak | None:
    """Returns the peaks of a device; None if they are not known, as for a CPU."""
    if device.device_kind in TPU_KINDS:
        chip = CHIPS[TPU_KINDS[device.device_kind]]
        return Peak(chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices, chip.hbm_bytes / chip.devices, chip.source)
    words = device.device_kind.replace("-", " ").split()  # NVIDIA A100-SXM4-80GB, NVIDIA A100 80GB PCIe
    return next((figures for names, figures in CARDS if set(names) <= set(words)), None)
