"""Packed rows: several items in a row, each a segment that ends with its Meta Tokens.

    tokens     a a a M M M M b b M M . .     M Meta Tokens, . padding
    segments   1 1 1 1 1 1 1 2 2 2 2 0 0
    meta       - - - 0 1 2 3 - - 0 1 - -     rows of the table of Meta Tokens
    reads            ^ ^ ^ ^     ^ ^         positions whose last states become vectors

If all states are read, there are no Meta Tokens, and vector v of a row is the state at its token v.

Attention of any kind stays inside a segment, so an item's vectors do not depend on the others of its row.

B rows, S tokens, P patches, V vectors of a row, A axes of positions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, UInt8

from metaembed_jax.batch.items import Example, Layout, Size
from metaembed_jax.sharding import named_sharding, put_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, as arrays of JAX or NumPy, or as shapes. Training adds an axis of microbatches in front of each.

    Attributes:
      tokens: rows of the vocabulary; 0 at Meta Tokens and in padding.
      segments: the number of the item in its row, from 1; 0 in padding.
      positions: for rotary embeddings, from 0 in each item.
      meta: the row of the table of Meta Tokens; -1 at other tokens.
      visual: the visual token (unit) of the row at each token; -1 at other tokens.
      reads: the positions of vectors, item by item; 0 after the last.
      row: the number of the row in its step: dropout depends on it, not on where the row is computed.
      patches: pixels; None if rows have no patches.
      patch_segments: as `segments`, of patches; 0 in any padding; None if rows have no patches.
      patch_arrays: the family's other arrays of patches, [B, P, *shape] by name.
    """

    tokens: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B A S"]
    meta: Int[Array, "B S"]
    visual: Int[Array, "B S"]
    reads: Int[Array, "B V"]
    row: Int[Array, "B"]
    patches: UInt8[Array, "B P X"] | None
    patch_segments: Int[Array, "B P"] | None
    patch_arrays: dict[str, Array]

    def map(self, function: Callable) -> "Batch":
        """Apply a function to every array."""
        return jax.tree.map(function, self)


class RowItem(NamedTuple):
    """An item and its Meta Tokens.

    Attributes:
      example: the prompt.
      meta: the number of Meta Tokens after it: the first rows of the table.
      budget: the number of them, from the end, that become vectors; None: all tokens of the prompt do, which has no Meta Tokens.
    """

    example: Example
    meta: int
    budget: int | None

    @property
    def read(self) -> int:
        """The number of vectors."""
        return len(self.example.tokens) if self.budget is None else self.budget

    @property
    def size(self) -> Size:
        """Tokens, patches and vectors of the item in a row."""
        return Size(len(self.example.tokens) + self.meta, self.example.patches, self.read)


def empty(rows: int, row: Size, layout: Layout) -> Batch:
    """Return rows of padding, in NumPy."""
    S, P, V = row

    def full(*shape: int, fill: int = 0) -> Any:  # the fields name JAX's arrays
        return np.full((rows, *shape), fill, np.int32)

    numbers: Any = np.arange(rows, dtype=np.int32)
    specs = layout.patches if P else {}
    arrays: dict[str, Any] = {name: np.full((rows, P, *spec.shape), spec.fill, spec.dtype) for name, spec in specs.items()}
    return Batch(
        tokens=full(S),
        segments=full(S),
        positions=full(layout.position_axes, S),
        meta=full(S, fill=-1),
        visual=full(S, fill=-1),
        reads=full(V),
        row=numbers,
        patches=arrays.pop("patches", None),
        patch_segments=full(P) if P else None,
        patch_arrays=arrays,
    )


def collate(rows: Sequence[Sequence[RowItem]], row: Size, layout: Layout, numbers: Sequence[int] | None = None) -> Batch:
    """Put items into rows, one after the other from the left.

    Args:
      rows: the items of each row; their sizes fit.
      numbers: indices of the rows in their step; 0, 1, 2 ... by default.

    Returns:
      A batch in NumPy.
    """
    batch = empty(len(rows), row, layout)
    if numbers is not None:
        batch.row[:] = numbers
    for number, items in enumerate(rows):
        token, patch, vector = 0, 0, 0
        for segment, item in enumerate(items, 1):
            _put_item(batch, number, segment, item, (token, patch, vector), layout)
            token, patch, vector = (start + size for start, size in zip((token, patch, vector), item.size, strict=True))
    return batch


def _put_item(batch: Batch, row: int, segment: int, item: RowItem, start: tuple[int, int, int], layout: Layout) -> None:
    (first, first_patch, first_vector), example = start, item.example
    prompt, size = len(example.tokens), item.size
    last = first + size.tokens
    batch.tokens[row, first : first + prompt] = example.tokens
    batch.segments[row, first:last] = segment
    batch.positions[row, :, first : first + prompt] = example.positions
    batch.positions[row, :, first + prompt : last] = example.positions.max(initial=-1) + 1 + np.arange(item.meta)
    batch.meta[row, first + prompt : last] = np.arange(item.meta)
    is_visual = example.visual >= 0
    batch.visual[row, first : first + prompt][is_visual] = example.visual[is_visual] + first_patch // layout.unit
    batch.reads[row, first_vector : first_vector + item.read] = np.arange(last - item.read, last)
    if batch.patches is not None and batch.patch_segments is not None:
        patches, arrays = slice(first_patch, first_patch + size.patches), {"patches": batch.patches, **batch.patch_arrays}
        batch.patch_segments[row, patches] = segment * example.patch_mask
        for name, array in example.patch_arrays.items():
            arrays[name][row, patches] = array


def batch_sharding(mesh: Mesh, rank: int, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array over the batch axes of a mesh; its rows are on the axis `axis`."""
    axes: list[str | None] = [None] * rank
    axes[axis] = "batch"
    return named_sharding(mesh, axes)


def abstract(rows: int, row: Size, layout: Layout, mesh: Mesh, microbatches: int | None = None) -> Batch:
    """Return a batch as shapes with shardings, for tracing and compiling.

    Args:
      rows: rows of a microbatch, over all devices.
      microbatches: the size of an axis in front; None: no such axis.
    """
    front = () if microbatches is None else (microbatches,)

    def sharded(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (*front, rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh, len(shape), len(front)))

    return empty(1, row, layout).map(sharded)


def put(batch: Batch, mesh: Mesh, axis: int = 0) -> Batch:
    """Send this host's rows to its devices.

    Args:
      axis: that of the rows; 1 after an axis of microbatches.
    """
    return batch.map(lambda x: put_rows(x, mesh, axis=axis))


def filled_shares(batch: Batch) -> Iterator[tuple[str, float]]:
    """Yield the used share of a batch's tokens and patches, by name."""
    yield "tokens", float(np.mean(batch.segments > 0))
    if batch.patch_segments is not None:
        yield "patches", float(np.mean(batch.patch_segments > 0))
