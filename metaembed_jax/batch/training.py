"""The batch of a training step: packed rows in microbatches, and where the vectors of each pair are in them.

M microbatches of b rows, V vectors of a row, B pairs, K negatives a pair, N documents: B positives, then B*K negatives by pair.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from metaembed_jax.batch import rows
from metaembed_jax.batch.items import Layout
from metaembed_jax.batch.packing import Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.errors import UserError
from metaembed_jax.sharding import put_whole, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """A step's pairs, as arrays of NumPy or JAX, or as shapes.

    Attributes:
      rows: [M, b, ...]; row r of the step is row r % b of microbatch r // b.
      queries, documents: the number of each item's first vector among those of the step, row * V + v. Where a pair lacks a
        negative, that of its positive.
      negative_mask: false where a pair lacks a negative.
      source: the number of each pair's source.
    """

    rows: Batch
    queries: Int[Array, "B"]
    documents: Int[Array, "N"]
    negative_mask: Bool[Array, "B K"]
    source: Int[Array, "B"]


class StepShape(NamedTuple):
    """The shape of every batch of a run.

    Attributes:
      row: the capacity of a row.
      microbatches: M.
      size: b, over all devices.
    """

    row: Size
    microbatches: int
    size: int

    @property
    def rows(self) -> int:
        """Rows of a step, those included that are always empty."""
        return self.microbatches * self.size


def step_shape(row: Size, rows: int, most: int, shards: int) -> StepShape:
    """Divides the rows of a step into microbatches as equal as can be; empty rows are at the end.

    Args:
      rows: that a step needs.
      most: `config.microbatch_rows`.
      shards: a microbatch is a multiple of it.

    Raises:
      UserError: a microbatch cannot hold a row for each shard.
    """
    if most and most < shards:
        raise UserError(
            f"config.microbatch_rows={most}: expected at least data x fsdp = {shards} of config.mesh, a row for each, "
            "or 0 for all rows of a step"
        )
    microbatches = -(-rows // (most // shards * shards)) if most else 1
    size = -(-rows // (microbatches * shards)) * shards
    return StepShape(row, microbatches, size)


def abstract(shape: StepShape, pairs: int, negatives: int, layout: Layout, mesh: Mesh) -> TrainingBatch:
    """A batch as shapes with shardings, for tracing and compiling.

    Args:
      negatives: a pair.
    """

    def whole(*axes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype, sharding=replicated(mesh))

    def kept(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(rows_memory(mesh)))

    return TrainingBatch(
        rows=rows.abstract(shape.size, shape.row, layout, mesh, shape.microbatches).map(kept),
        queries=whole(pairs),
        documents=whole(pairs * (1 + negatives)),
        negative_mask=whole(pairs, negatives, dtype=jnp.bool_),
        source=whole(pairs),
    )


def put(batch: TrainingBatch, mesh: Mesh) -> TrainingBatch:
    """Send a batch to the mesh: this host's rows of it to `rows_memory`, and all the rest whole to every device."""
    whole = {field.name: put_whole(getattr(batch, field.name), mesh) for field in dataclasses.fields(batch) if field.name != "rows"}
    return TrainingBatch(rows=rows.put(batch.rows, mesh, axis=1, memory_kind=rows_memory(mesh)), **whole)


def rows_memory(mesh: Mesh) -> str | None:
    """The kind of memory that holds the rows of a step: the hosts', from which microbatches go to TPUs one at a time.

    On a device, the rows of two steps would lie: those that it computes with, and the next.
    """
    return "pinned_host" if mesh.devices.flat[0].platform == "tpu" else None
