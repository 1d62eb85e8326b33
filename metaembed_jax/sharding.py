"""The mesh, and the one table that says how arrays lie on it.

Parameters, activations, optimizer state and checkpoints name their axes by meaning ("batch", "mlp", ...); `RULES`
maps each meaning to axes of the mesh. Nothing else in the package knows a mesh axis but the loss and the search, which
are written with `shard_map`.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from metaembed_jax.errors import UserError
from metaembed_jax.links import arrange

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES = {
    "batch": BATCH_AXES,
    "layers": None,
    "embed": "fsdp",
    "vocabulary": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "patch": None,
    "output": None,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 0, devices: Sequence | None = None) -> Mesh:
    """Makes a mesh with axes `MESH_AXES` whose neighbours are neighbours on the links between chips.

    Args:
      data, fsdp, tensor: sizes of the axes; one may be -1, which takes all devices that the others leave.
      slices: as in `links.arrange`.
      devices: all by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit its slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({named}): sizes are positive, and at most one is -1 (all remaining devices)")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"config.mesh ({named}) does not fit {len(devices)} devices: the sizes must multiply to that number")
    return Mesh(arrange(devices, tuple(sizes), slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the batch axis is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def row_parts(mesh: Mesh, rows: int) -> tuple[list[Int[np.ndarray, " n"]], int]:
    """How the hosts share the rows of a batch: equal parts of it, and which of them lies on this host's devices.

    Hosts that hold the same rows, where the tensor axis goes over several, are of one part.
    """
    of_host: dict[int, set[int]] = {}
    for device, place in named_sharding(mesh, ("batch",)).devices_indices_map((rows,)).items():
        of_host.setdefault(device.process_index, set()).update(range(rows)[place[0]])
    parts = sorted({tuple(sorted(part)) for part in of_host.values()})
    return [np.array(part) for part in parts], parts.index(tuple(sorted(of_host[jax.process_index()])))


def rows_here(mesh: Mesh, rows: int) -> Int[np.ndarray, " n"]:
    """Which rows of a batch of so many lie on this host's devices, in order."""
    parts, here = row_parts(mesh, rows)
    return parts[here]


def put_rows(x: np.ndarray, mesh: Mesh, axis: int = 0, memory_kind: str | None = None) -> jax.Array:
    """This host's rows of a batch, as a part of the batch over the whole mesh.

    Args:
      x: what `rows_here` names, along `axis`.
      memory_kind: of the devices' or their hosts' memory; None: the devices'.
    """
    shards = batch_shards(mesh)
    size = x.shape[axis] * shards // len(rows_here(mesh, shards))
    here, shape = rows_here(mesh, size), (*x.shape[:axis], size, *x.shape[axis + 1 :])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(size)
        first = np.searchsorted(here, start)
        return x[(*index[:axis], slice(first, first + stop - start))]

    axes = [None] * x.ndim
    axes[axis] = "batch"
    return jax.make_array_from_callback(shape, named_sharding(mesh, axes).with_memory_kind(memory_kind), part)


def rows_of(x: jax.Array) -> np.ndarray:
    """What of a batch lies on this host's devices: the way back from `put_rows`."""
    pieces = {shard.index[0].indices(x.shape[0])[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def put_whole(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """What every host has alike, whole on every device."""
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
    """The sharding of an array whose axes have these meanings.

    With `shape`, a dimension that its mesh axes do not divide is replicated, so that any mesh can hold any model.
    """
    spec = []
    for dimension, name in enumerate(logical_axes):
        axes = RULES[name] if name is not None else None
        if axes is not None and shape is not None:
            size = int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))
            axes = axes if shape[dimension] % size == 0 else None
        spec.append(axes)
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation to the rules table on the mesh of `jax.set_mesh`; without one it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical_axes, x.shape))


def parameter_shardings(mesh: Mesh, state: nnx.State) -> dict:
    """The sharding of every parameter of an abstract state, from the `logical_axes` each was created with, as nested dicts."""

    def of(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(named_sharding(mesh, variable.get_metadata()["logical_axes"], variable.shape))

    return nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
