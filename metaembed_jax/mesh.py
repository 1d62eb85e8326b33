"""The mesh of a run."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from metaembed_jax.errors import UserError
from metaembed_jax.links import arrange
from metaembed_jax.sharding import MESH_AXES

WEIGHTS = 0.6  # the most of a device's memory for weights that encode (7b on v5e, fsdp 2: weights 48 %, the rest of a call 32 %)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 0, devices: Sequence | None = None) -> Mesh:
    """Make a mesh with axes `MESH_AXES` whose neighbours are neighbours on the links between chips.

    Args:
      data, fsdp, tensor: sizes of the axes; one may be -1 (all remaining devices).
      slices: as in `links.arrange`.
      devices: devices of the mesh; all by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit its slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({named}): expected positive sizes; at most one may be -1 (all remaining devices)")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"config.mesh ({named}) does not fit {len(devices)} devices: expected sizes that multiply to that number")
    data, fsdp, tensor = sizes
    return Mesh(arrange(devices, (data, fsdp, tensor), slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def smallest_fsdp(weights: int, memory: int, devices: int) -> int:
    """Return the smallest size of the fsdp axis at which weights leave room for a call of the encoder; all devices if none does.

    Args:
      weights: bytes of all weights.
      memory: bytes of a device.
      devices: number of devices that the axis may go over.
    """
    sizes = (size for size in range(1, devices) if devices % size == 0)
    return next((size for size in sizes if weights <= WEIGHTS * memory * size), devices)
