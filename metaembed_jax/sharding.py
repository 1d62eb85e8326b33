"""The sharding of arrays on the mesh, by one table.

Parameters, activations, optimizer state and checkpoints name their axes by meaning ("batch", "mlp", ...), and `RULES` maps each
meaning to axes of the mesh. Only the loss and the search, which use `shard_map`, name axes of the mesh.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

HOST = "pinned_host"  # the kind of memory that devices read without their host's help

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


def batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of the batch axis."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def rows_here(mesh: Mesh, rows: int, host: int | None = None) -> Int[np.ndarray, " n"]:
    """Return the indices of the rows of a batch that are on a host's devices, in order.

    Hosts have disjoint rows, the same number each; if the tensor axis crosses hosts, they share rows.

    Args:
      host: index of the host; this host by default.
    """
    host = jax.process_index() if host is None else host
    indices = named_sharding(mesh, ("batch",)).devices_indices_map((rows,))
    local = {row for device, index in indices.items() if device.process_index == host for row in range(rows)[index[0]]}
    return np.array(sorted(local))


def rows_owned(mesh: Mesh, rows: int, host: int | None = None) -> Int[np.ndarray, " n"]:
    """Return those of `rows_here` that no earlier host has, so that each row has one owner."""
    host = jax.process_index() if host is None else host
    hosts = {device.process_index for device in mesh.devices.flat}
    earlier = {row for other in hosts if other < host for row in rows_here(mesh, rows, other).tolist()}
    return np.array([row for row in rows_here(mesh, rows, host).tolist() if row not in earlier], np.int64)


def put_rows(x: np.ndarray, mesh: Mesh, axis: int = 0, memory_kind: str | None = None) -> jax.Array:
    """Return a batch over the whole mesh, from the rows of each host.

    Args:
      x: this host's rows, as in `rows_here`, along `axis`.
      memory_kind: as in `NamedSharding`; the devices' memory by default.
    """
    shards = batch_shards(mesh)
    size = x.shape[axis] * shards // len(rows_here(mesh, shards))
    here, shape = rows_here(mesh, size), (*x.shape[:axis], size, *x.shape[axis + 1 :])

    def shard(index) -> np.ndarray:
        start, stop, _ = index[axis].indices(size)
        first = np.searchsorted(here, start)
        return x[(*index[:axis], slice(first, first + stop - start))]

    axes: list[str | None] = [None] * x.ndim
    axes[axis] = "batch"
    sharding = named_sharding(mesh, axes)
    return jax.make_array_from_callback(shape, sharding.with_memory_kind(memory_kind) if memory_kind else sharding, shard)


def fetch_rows(x: jax.Array) -> np.ndarray:
    """Return this host's rows of a sharded batch; inverse of `put_rows`."""
    shards = {shard.index[0].indices(x.shape[0])[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def put_replicated(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Put a copy of an array, which must be the same on every host, on every device."""
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])


def named_sharding(
    mesh: Mesh | AbstractMesh, logical_axes: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """Return the sharding of an array by the meanings of its axes.

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
    """Shard an activation by `RULES` on the mesh of `jax.set_mesh`; without a mesh, return it unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical_axes, x.shape))


def parameter_shardings(mesh: Mesh, state: nnx.State) -> dict:
    """Return the sharding of every parameter of an abstract state, by its `logical_axes`, as nested dicts."""

    def with_sharding(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(named_sharding(mesh, variable.get_metadata()["logical_axes"], variable.shape))

    return nnx.to_pure_dict(jax.tree.map(with_sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_bytes(tree, in_host: bool = False) -> int:
    """Return the bytes of one device's shards of abstract arrays, in its own memory or in its host's, without padding."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == HOST) == in_host]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
