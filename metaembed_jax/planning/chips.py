"""TPU chips, what each can do, and slices of them to compile for without having one."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.experimental import topologies

from metaembed_jax.errors import UserError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPU. All figures but `usable_bytes` are of a chip, as its maker publishes them.

    Attributes:
      flops: bfloat16 operations a second.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second between memory and cores.
      ici_bandwidth: bytes a second over all links to other chips, both directions together.
      dcn_bandwidth: bytes a second that it can send to other slices: its share of its host's network cards.
      usable_bytes: memory of a device that the compiler gives to a program: the limit in libtpu 0.0.52's own complaint about
        one that is too large.
      devices: how many a chip is to JAX; two cores that work as one are one.
      accelerator: what Cloud calls slices of it, before their size.
      cores: by which that size counts.
      config: how the cores of a chip work together, where libtpu must be told.
      shapes: of the slices there are.
      source: of the figures.
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
    # v4's page has neither ICI, six links of 50 GB/s each way (arXiv 2304.01433), nor DCN, 25 GB/s for a host of four chips
    # (https://jax-ml.github.io/scaling-book/tpus). The other pages have DCN in bits, v5e's page for a pod of 256 chips.
    "v4": Chip(275e12, 32 * GIB, 1200e9, 600e9, 6.25e9, 30.75 * GIB, CLOUD + "v4", SOLID, "v4", cores=2, config="megacore"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9, 6.4e12 / 8 / 256, 15.75 * GIB, CLOUD + "v5e", FLAT, "v5litepod"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9, 50e9 / 8, 95.73 * GIB, CLOUD + "v5p", SOLID, "v5p", cores=2),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 800e9, 100e9 / 8, 31.24 * GIB, CLOUD + "v6e", FLAT, "v6e"),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 100e9 / 8, 94.74 * GIB, CLOUD + "tpu7x", SOLID, "tpu7x", 2, 2),
}


class Topology(NamedTuple):
    """A slice, or several of one kind.

    Attributes:
      name: such as v5e:2x4, or 2xv5e:2x4.
      chip: of the slices.
      devices: as JAX sees them, without anything behind them.
      hosts: how many machines they are attached to.
      slices: how many slices.
    """

    name: str
    chip: Chip
    devices: Sequence
    hosts: int
    slices: int


def topology(name: str) -> Topology:
    """Returns the slices of a name, `generation:shape` or `NUMBERxgeneration:shape`.

    Raises:
      UserError: there is no such slice, or no libtpu to ask about it.
    """
    number, kind, shape = re.fullmatch(r"(?:([1-9]\d?)x)?([^:]*):?(.*)", name, re.DOTALL).groups()
    slices = int(number or 1)
    if kind not in CHIPS or shape not in CHIPS[kind].shapes:  # libtpu ends the process over some that are too large
        known = "; ".join(f"{kind}: {' '.join(chip.shapes)}" for kind, chip in CHIPS.items())
        raise UserError(
            f"--topology={name}: no such slice; expected generation:shape, such as v5e:2x4, or 2xv5e:2x4 for two slices, of {known}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which holds the TPU's compiler, is not installed: pip install metaembed-jax[tpu]")
    chip = CHIPS[kind]
    more = {"chip_config_name": chip.config} if chip.config else {}
    more |= {"num_slices": slices} if slices > 1 else {}
    with _quiet(chip, shape):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **more).devices
    return Topology(name, chip, devices, len({device.process_index for device in devices}), slices)


@contextlib.contextmanager
def _quiet(chip: Chip, shape: str) -> Iterator[None]:
    """While libtpu loads: no search for a TPU, no warnings that it lacks one, and no lock, which others may hold."""
    chips = math.prod(int(side) for side in shape.split("x"))
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{chips * chip.cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
