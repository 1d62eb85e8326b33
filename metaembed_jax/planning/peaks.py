"""Published peaks of the devices that JAX names: bfloat16 FLOP/s, memory and its bandwidth, of TPUs and NVIDIA cards."""

from typing import NamedTuple

import jax

from metaembed_jax.planning.chips import CHIPS


class Peak(NamedTuple):
    """The peaks of one device as JAX counts them; a TPU v7x chip is two.

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


# `Device.device_kind` of each generation, by all names that JAX has used.
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
# The words that a card's `device_kind` holds, special cases before general ones. NVIDIA publishes most of its figures with
# sparsity, which doubles them: these are the dense halves. A form factor that is not named is SXM.
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
    # Of Amazon alone, which publishes the bandwidth; half as many tensor operations a second as NVIDIA's A10 has.
    (("A10G",), Peak(70e12, 600e9, 24e9, "https://aws.amazon.com/ec2/instance-types/g5/")),
    # No bfloat16 units: the figure is float16's.
    (("T4",), Peak(65e12, 320e9, 16e9, NVIDIA + "tesla-t4")),
    (
        ("RTX", "4090"),
        Peak(165.2e12, 1008e9, 24e9, "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    ),
)


def peak(device: jax.Device) -> Peak | None:
    """Returns the peaks of a device, or None where they are not known, as those of a CPU."""
    if device.device_kind in TPU_KINDS:
        chip = CHIPS[TPU_KINDS[device.device_kind]]
        return Peak(chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices, chip.hbm_bytes / chip.devices, chip.source)
    words = device.device_kind.replace("-", " ").split()  # NVIDIA A100-SXM4-80GB, NVIDIA A100 80GB PCIe
    return next((figures for names, figures in CARDS if set(names) <= set(words)), None)
