"""TPU chips, what each can do, and slices of them to compile for without having one."""

import contextlib
import dataclasses
import importlib.util
import math
import os
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
    # v4's page has no figure for ICI: six links of 50 GB/s each way (arXiv 2304.01433).
    "v4": Chip(275e12, 32 * GIB, 1200e9, 600e9, 30.75 * GIB, CLOUD + "v4", SOLID, "v4", cores=2, config="megacore"),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9, 15.75 * GIB, CLOUD + "v5e", FLAT, "v5litepod"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9, 95.73 * GIB, CLOUD + "v5p", SOLID, "v5p", cores=2),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 800e9, 31.24 * GIB, CLOUD + "v6e", FLAT, "v6e"),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 94.74 * GIB, CLOUD + "tpu7x", SOLID, "tpu7x", cores=2, devices=2),
}


class Topology(NamedTuple):
    """A slice.

    Attributes:
      name: such as v5e:2x4.
      chip: what it is made of.
      devices: as JAX sees them, without anything behind them.
      hosts: how many machines they are attached to.
    """

    name: str
    chip: Chip
    devices: Sequence
    hosts: int


def topology(name: str) -> Topology:
    """A slice by its name, `generation:shape`.

    Raises:
      UserError: there is no such slice, or no libtpu to ask about it.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or shape not in CHIPS[kind].shapes:  # libtpu ends the process over some that are too large
        known = "; ".join(f"{kind}: {' '.join(chip.shapes)}" for kind, chip in CHIPS.items())
        raise UserError(f"--topology={name}: no such slice; write generation:shape, such as v5e:2x4. There are {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which holds the TPU's compiler, is not installed: pip install metaembed-jax[tpu]")
    chip = CHIPS[kind]
    more = {"chip_config_name": chip.config} if chip.config else {}
    with _quiet(chip, shape):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    return Topology(name, chip, devices, len({device.process_index for device in devices}))


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
