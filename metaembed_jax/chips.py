"""Published figures of TPUs and NVIDIA cards: bfloat16 FLOP/s, memory, bandwidths."""

import dataclasses
from typing import NamedTuple

SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPU. All figures except `usable_bytes` are for one chip, as published by Google.

    Attributes:
      flops: bfloat16 operations a second.
      hbm_bytes: size of its memory.
      hbm_bandwidth: bytes a second between memory and cores.
      ici_bandwidth: bytes a second over all links to other chips, both directions together.
      dcn_bandwidth: bytes a second that it can send to other slices: its share of its host's network cards.
      usable_bytes: memory of a device that a program may use: the limit in the error of libtpu 0.0.52 for a program that is too
        large.
      source: page that publishes the figures.
      shapes: shapes of its slices.
      accelerator: the name of its slices in Google Cloud, before their size.
      cores: cores of a chip, as Google Cloud counts them in that size.
      devices: devices of a chip in JAX; two cores that work as one are one device.
      config: how the cores of a chip work together, if libtpu needs to know.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    usable_bytes: float
    source: str
    shapes: tuple[str, ...]
    accelerator: str
    cores: int = 1
    devices: int = 1
    config: str = ""


GIB = 2**30
CLOUD = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    # The page of v4 lacks ICI (six links of 50 GB/s each way: arXiv 2304.01433) and DCN (25 GB/s for a host of four chips:
    # https://jax-ml.github.io/scaling-book/tpus). The other pages give DCN in bits, that of v5e for a pod of 256 chips.
    "v4": Chip(275e12, 32 * GIB, 1200e9, 600e9, 6.25e9, 30.75 * GIB, CLOUD + "v4", SHAPES_3D, "v4", cores=2, config="megacore"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9, 6.4e12 / 8 / 256, 15.75 * GIB, CLOUD + "v5e", SHAPES_2D, "v5litepod"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9, 50e9 / 8, 95.73 * GIB, CLOUD + "v5p", SHAPES_3D, "v5p", cores=2),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 800e9, 100e9 / 8, 31.24 * GIB, CLOUD + "v6e", SHAPES_2D, "v6e"),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 100e9 / 8, 94.74 * GIB, CLOUD + "tpu7x", SHAPES_3D, "tpu7x", 2, 2),
}


class Peak(NamedTuple):
    """The peaks of one device of JAX; a TPU v7x chip is two devices.

    Attributes:
      flops: dense bfloat16 operations a second.
      hbm_bandwidth: bytes a second between memory and cores.
      hbm_bytes: size of its memory.
      source: page that publishes the figures.
    """

    flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    source: str


# The `Device.device_kind` values that JAX has used for TPUs, and their generations.
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
# Words of a card's `device_kind`, special cases first. A card that names no form factor is SXM. NVIDIA mostly publishes figures
# for sparse products, which are twice those for dense ones; these are for dense ones.
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
    # It is made for Amazon, which publishes the bandwidth. Its tensor cores have half the speed of NVIDIA's A10.
    (("A10G",), Peak(70e12, 600e9, 24e9, "https://aws.amazon.com/ec2/instance-types/g5/")),
    # It has no bfloat16 units: the figure is for float16.
    (("T4",), Peak(65e12, 320e9, 16e9, NVIDIA + "tesla-t4")),
    (
        ("RTX", "4090"),
        Peak(165.2e12, 1008e9, 24e9, "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    ),
)


def peak(device) -> Peak | None:
    """Return the peaks of a `jax.Device`; None if they are not known, as for a CPU."""
    if device.device_kind in TPU_KINDS:
        chip = CHIPS[TPU_KINDS[device.device_kind]]
        return Peak(chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices, chip.hbm_bytes / chip.devices, chip.source)
    words = device.device_kind.replace("-", " ").split()  # NVIDIA A100-SXM4-80GB, NVIDIA A100 80GB PCIe
    return next((peaks for names, peaks in CARDS if set(names) <= set(words)), None)
