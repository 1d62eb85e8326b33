"""The order of devices in a mesh: neighbours on an axis are neighbours on the links between chips.

The chips of a TPU slice form a box, with links (ICI) between neighbours. Slices are joined by the data center's network (DCN),
which is tens of times slower. A collective over a mesh axis goes around the ring of its devices.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from metaembed_jax.errors import UserError


class Ring(NamedTuple):
    """The longest ring of a mesh axis.

    Attributes:
      hops: links of one round.
      step: the most links between two neighbours on the axis.
      crossings: steps from one slice to another, which use no links.
    """

    hops: int
    step: int
    crossings: int


def arrange(devices: Sequence, sizes: tuple[int, int, int], slices: int = 0) -> np.ndarray:
    """Return devices as an array of `sizes` (data, fsdp, tensor).

    The devices of a TPU slice get the order of `mesh_utils.create_device_mesh`, or keep their own where that has shorter rings (on
    v5e:2x4, JAX's order gives a (4, 2) mesh rings of 8 hops, their own 4). Several slices make JAX's hybrid mesh: `data` goes over
    slices, and also inside them if it is larger; fsdp and tensor stay inside. Devices of other platforms keep their order, by host.

    Args:
      slices: the expected number; 0: as many as the devices report; 1: fsdp and tensor may cross slices.

    Raises:
      UserError: the devices report another number of slices, or it does not divide data.
    """
    slices = _count_slices(devices, sizes, slices)
    if devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices)
    groups: dict[int, list] = {}
    for device in devices:
        groups.setdefault(_slice_index(device), []).append(device)
    if slices < len(groups):
        return np.asarray(devices).reshape(sizes)
    inside = (sizes[0] // slices, *sizes[1:])
    return np.concatenate([_arrange_slice(groups[index], inside) for index in sorted(groups)])


def rings(mesh: Mesh) -> dict[str, Ring]:
    """Return the rings of a TPU mesh by axis; none on other platforms, whose devices have no coordinates.

    Each side of a slice counts as closed, with one link from its last chip to its first. Real slices have that link on sides of
    16 chips (v5e, v6e), and on multiples of 4 in whole cubes (v4, v5p, tpu7x); elsewhere the ring returns
    over the same links, in the other direction.
    """
    if not hasattr(mesh.devices.flat[0], "coords"):
        return {}
    return dict(zip(mesh.axis_names, _rings(mesh.devices), strict=True))


def _rings(devices: np.ndarray) -> list[Ring]:
    coordinates = np.array([device.coords for device in devices.flat])
    sides = np.ptp(coordinates, axis=0) + 1
    coordinates = coordinates.reshape(*devices.shape, -1)
    slices = np.array([_slice_index(device) for device in devices.flat]).reshape(devices.shape)
    longest = []
    for axis in range(devices.ndim):
        distances = np.abs(coordinates - np.roll(coordinates, -1, axis))
        links = np.minimum(distances, sides - distances).sum(-1)
        is_crossing = slices != np.roll(slices, -1, axis)
        links[is_crossing] = 0
        longest.append(Ring(int(links.sum(axis).max()), int(links.max()), int(is_crossing.sum(axis).max())))
    return longest


def _arrange_slice(devices: Sequence, sizes: tuple[int, int, int]) -> np.ndarray:
    unchanged = np.asarray(devices).reshape(sizes)
    try:
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError) as error:
        warnings.warn(f"the mesh keeps the order of its devices, which may be slow: {' '.join(str(error).split())}", stacklevel=4)
        return unchanged
    return min(arranged, unchanged, key=lambda order: sum(ring.hops for ring in _rings(order)))


def _count_slices(devices: Sequence, sizes: tuple[int, int, int], slices: int) -> int:
    members = np.unique([_slice_index(device) for device in devices], return_counts=True)[1]
    reported, data = len(members), sizes[0]
    if slices not in (0, 1, reported):
        raise UserError(
            f"config.mesh.slices={slices}: the devices are of {reported}; expected that number, 0 (all), "
            "or 1 (fsdp and tensor may cross slices)"
        )
    slices = slices or reported
    if data % slices and devices[0].platform != "tpu":
        return 1  # the "slices" are hosts: an axis that does not fit in one may go over several
    if data % slices or (len(set(members)) > 1 and slices > 1):
        raise UserError(
            f"config.mesh.data={data} does not divide over {slices} slices of {' and '.join(map(str, sorted(set(members))))} "
            f"devices: expected a multiple of {slices}, and slices of one size; config.mesh.slices=1 lets fsdp and tensor cross"
        )
    return slices


def slice_size(devices: Sequence) -> int:
    """Return the number of devices that fsdp and tensor may go over: those of a slice, and all on other platforms than TPUs."""
    if devices[0].platform != "tpu":
        return len(devices)
    return sum(_slice_index(device) == _slice_index(devices[0]) for device in devices)


def _slice_index(device) -> int:
    """Return the slice of a device; if JAX reports none, 0 for a TPU (compile-only devices of one slice), else the host."""
    return getattr(device, "slice_index", 0 if device.platform == "tpu" else device.process_index)
