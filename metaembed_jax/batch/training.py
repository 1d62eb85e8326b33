"""The batch of a training step: packed rows in microbatches, and the positions of each pair's vectors in them.

M microbatches of b rows, V vectors of a row, B pairs, K negatives a pair, C = 1 + K candidates, N documents: B positives, then B*K
negatives by pair, W words of a digest.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.batch import rows
from metaembed_jax.batch.items import Layout, Size
from metaembed_jax.batch.rows import Batch
from metaembed_jax.errors import UserError
from metaembed_jax.sharding import HOST, put_replicated, put_rows, replicated

REGISTER = (8, 128)  # of a TPU
DIGEST_WORDS = 2  # of 32 bits: different items of a batch of a thousand pairs have the same words once in 10^12 batches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """A step's pairs, as arrays of JAX or NumPy, or as shapes.

    Attributes:
      rows: [M, b, ...]; row r of the step is row r % b of microbatch r // b. Pixels in a host's memory are [M, b, N, 8, 128].
      queries, documents: the number of each item's first vector in the step, row * V + v. A missing negative has the number of
        its pair's positive.
      negative_mask: false for missing negatives.
      source: the number of each pair's source.
      digests: [M, b, W, V], W words of the digest of each item, at its first vector; the same for the same content.
      teacher_scores: of each positive, then of its hard negatives; NaN where missing. None if no loss of the run reads them.
      labels: weights of right answers, of the same documents; 0 for missing negatives. None if no source of the run has any.
    """

    rows: Batch
    queries: Int[Array, "B"]
    documents: Int[Array, "N"]
    negative_mask: Bool[Array, "B K"]
    source: Int[Array, "B"]
    digests: Int[Array, "M b W V"]
    teacher_scores: Float[Array, "B C"] | None = None
    labels: Float[Array, "B C"] | None = None


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
        """Rows of a step, including those that are always empty."""
        return self.microbatches * self.size


def step_shape(row: Size, rows: int, most: int, shards: int) -> StepShape:
    """Divide the rows of a step into microbatches of one size, as small as possible; empty rows are at the end.

    Args:
      rows: that a step needs.
      most: `config.rows.microbatch_rows`.
      shards: a microbatch is a multiple of it.

    Raises:
      UserError: as `check_microbatch`.
    """
    check_microbatch(most, shards)
    microbatches = -(-rows // (most // shards * shards)) if most else 1
    size = -(-rows // (microbatches * shards)) * shards
    return StepShape(row, microbatches, size)


def check_microbatch(most: int, shards: int) -> None:
    """Refuse microbatches without a row for each shard.

    Raises:
      UserError: names both numbers.
    """
    if 0 < most < shards:
        raise UserError(
            f"config.rows.microbatch_rows={most}: expected at least data x fsdp = {shards} of config.mesh, a row for each, "
            "or 0 for all rows of a step"
        )


def abstract(
    shape: StepShape, pairs: int, negatives: int, layout: Layout, mesh: Mesh, has_teacher_scores: bool = False
) -> TrainingBatch:
    """Return a batch as shapes with shardings, for tracing and compiling.

    Args:
      negatives: a pair.
    """

    def whole(*axes: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(axes, dtype, sharding=replicated(mesh))

    return TrainingBatch(
        rows=_abstract_in_host(rows.abstract(shape.size, shape.row, layout, mesh, shape.microbatches), mesh),
        queries=whole(pairs),
        documents=whole(pairs * (1 + negatives)),
        negative_mask=whole(pairs, negatives, dtype=jnp.bool_),
        source=whole(pairs),
        digests=_abstract_digests(shape, mesh),
        teacher_scores=whole(pairs, 1 + negatives, dtype=jnp.float32) if has_teacher_scores else None,
    )


def put(batch: TrainingBatch, mesh: Mesh) -> TrainingBatch:
    """Send a batch to the mesh: rows to this host's devices, streamed pixels to its memory, the rest to every device."""
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    whole = {name: x for name, x in arrays.items() if name not in ("rows", "digests") and x is not None}
    others: dict[str, Any] = {name: put_replicated(x, mesh) for name, x in whole.items()}
    others["digests"] = put_rows(np.asarray(batch.digests), mesh, axis=1)
    pixels = _streamed_pixels(batch.rows, mesh)
    if pixels is None:
        return TrainingBatch(rows=rows.put(batch.rows, mesh, axis=1), **others)
    without_pixels = rows.put(dataclasses.replace(batch.rows, patches=None), mesh, axis=1)
    in_host = put_rows(pixels.reshape(_in_registers(pixels.shape)), mesh, axis=1, memory_kind=HOST)
    return TrainingBatch(rows=dataclasses.replace(without_pixels, patches=in_host), **others)


def _abstract_digests(shape: StepShape, mesh: Mesh) -> Any:
    axes = (shape.microbatches, shape.size, DIGEST_WORDS, shape.row.vectors)
    return jax.ShapeDtypeStruct(axes, jnp.int32, sharding=rows.batch_sharding(mesh, len(axes), axis=1))


def _streamed_pixels(batch: Batch, mesh: Mesh) -> Any | None:
    """Return the pixels that stay in the hosts' memory, from which they go to the devices one microbatch at a time; or None.

    They do on TPUs. A device would otherwise hold the pixels of two steps: the one that it computes, and the next.
    """
    if batch.patches is None or mesh.devices.flat[0].platform != "tpu":
        return None
    return None if math.prod(batch.patches.shape[2:]) % math.prod(REGISTER) else batch.patches


def _in_registers(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of pixels in a host's memory, [M, b, N, 8, 128].

    In other shapes, libtpu 0.0.52 may mix pixels of several microbatches, or copy all of them to the device and back for each
    microbatch.
    """
    return (*shape[:2], math.prod(shape[2:]) // math.prod(REGISTER), *REGISTER)


def _abstract_in_host(batch: Batch, mesh: Mesh) -> Batch:
    pixels = _streamed_pixels(batch, mesh)
    if pixels is None:
        return batch
    shape = _in_registers(pixels.shape)
    in_host = rows.batch_sharding(mesh, len(shape), axis=1).with_memory_kind(HOST)
    return dataclasses.replace(batch, patches=jax.ShapeDtypeStruct(shape, pixels.dtype, sharding=in_host))
