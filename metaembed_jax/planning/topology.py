"""TPU slices to compile for, which need not exist."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.experimental import topologies

from metaembed_jax.chips import CHIPS, Chip
from metaembed_jax.errors import UserError


class Topology(NamedTuple):
    """One TPU slice, or several of one kind.

    Attributes:
      name: such as v5e:2x4, or 2xv5e:2x4.
      chip: generation of the slices.
      devices: compile-only devices of all slices.
      hosts: the number of hosts.
      slices: the number of slices.
    """

    name: str
    chip: Chip
    devices: Sequence
    hosts: int
    slices: int


def topology(name: str) -> Topology:
    """Return the slices of a name, `generation:shape` or `NUMBERxgeneration:shape`.

    Raises:
      UserError: an unknown slice, or libtpu is not installed.
    """
    kind, _, shape = name.partition(":")
    number = re.match(r"([1-9]\d?)x", kind)
    slices, kind = (int(number[1]), kind[number.end() :]) if number else (1, kind)
    if kind not in CHIPS or shape not in CHIPS[kind].shapes:  # libtpu ends the process for some that are too large
        known = "; ".join(f"{kind}: {' '.join(chip.shapes)}" for kind, chip in CHIPS.items())
        raise UserError(
            f"--topology={name}: no such slice; expected generation:shape, such as v5e:2x4, or 2xv5e:2x4 for two slices, of {known}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which holds the TPU's compiler, is not installed: pip install metaembed-jax[tpu]")
    chip = CHIPS[kind]
    options = {"chip_config_name": chip.config} if chip.config else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    with _libtpu_environment(chip, shape):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
    return Topology(name, chip, devices, len({device.process_index for device in devices}), slices)


@contextlib.contextmanager
def _libtpu_environment(chip: Chip, shape: str) -> Iterator[None]:
    """Set variables while libtpu loads: it must not look for a TPU, warn that there is none, or take a lock that others hold."""
    chips = math.prod(int(side) for side in shape.split("x"))
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{chips * chip.cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
