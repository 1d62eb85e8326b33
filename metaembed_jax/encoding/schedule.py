"""The calls that encode a block of items. They depend on sizes and on the number of devices alone, so all hosts make the same,
and a block is encoded by the same calls whatever was encoded before it.

Items wait in a pool until they fill `WINDOW` rows of each device, and packing chooses among all of them. A call has 16, 4 or 1 rows
for each device, so three programs encode everything. A few short texts have a smaller row. The first call of a stream waits for its
items to be decoded, nothing is decoded during the last call, and where decoding is as slow as computing, the first call of 16 rows
waits for as many. So there are none in the first `LONG` rows of a block: 300 photos take 15 % longer with them. Indexing has
shorter blocks, and two programs.

N items, D shards of the batch axis (a device, or several that share rows).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.packing import least_rows, pack

CALL_ROWS = (16, 4, 1)  # rows of a shard in a call
LONG = 256  # rows of a shard in a block that are sent before the first call of the largest size
WINDOW = 64  # rows of a shard that the items of the pool fill
SHORTEST = 16  # tokens of the shortest prompts that can fill a row; a row of shorter prompts has too few vectors
VECTORS = 16  # the number of vectors of a row is a multiple of this
SMALL = 128  # tokens of the smaller row


class Call(NamedTuple):
    """A call of a program.

    Attributes:
      size: rows over all shards.
      row: the capacity of each row.
      rows: the items of each row, in order; rows beyond these are empty.
    """

    size: int
    row: Size
    rows: list[list[int]]


def row_size(tokens: int, patches: int, meta: int, budget: int | None) -> Size:
    """Return the capacity of a row for items with `meta` Meta Tokens, `budget` of which are read; None: all states are read."""
    if budget is None:
        return Size(tokens, patches, tokens)
    items = max(tokens // (SHORTEST + meta), 1)
    return Size(tokens, patches, -(-items * budget // VECTORS) * VECTORS)


class Schedule:
    """Calls for the items of a block, whose sizes arrive in chunks.

    Args:
      tokens, patches: capacity of a row.
      meta, budget: number of Meta Tokens of each item, and how many of them are read; None: all states are read.
      shards: number of shards.
    """

    def __init__(self, tokens: int, patches: int, meta: int, budget: int | None, shards: int):
        self._size, self._meta, self._budget, self._shards = (tokens, patches), meta, budget, shards
        self._numbers_N, self._sizes_N3 = np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
        self._sent, self._has_patches = 0, False

    @property
    def is_full(self) -> bool:
        """True if the pool has enough items to choose from."""
        return least_rows(self._sizes_N3, self._row()) >= WINDOW * self._shards

    def add(self, numbers_N: Int[np.ndarray, "N"], prompts_N2: Int[np.ndarray, "N 2"]) -> None:
        """Put items into the pool.

        Args:
          prompts_N2: tokens (without Meta Tokens) and patches of each item.
        """
        vectors_N1 = prompts_N2[:, :1] if self._budget is None else np.full((len(numbers_N), 1), self._budget)
        sizes_N3 = np.concatenate([prompts_N2 + np.array([[self._meta, 0]]), vectors_N1], axis=1)
        self._numbers_N = np.concatenate([self._numbers_N, numbers_N])
        self._sizes_N3 = np.concatenate([self._sizes_N3, sizes_N3])
        self._has_patches |= bool(sizes_N3[:, 1].any())

    def take(self, is_last: bool) -> Iterator[Call]:
        """Yield calls for items of the pool, oldest first: for all items if `is_last`, otherwise full calls of the largest size."""
        if not len(self._numbers_N):
            return
        if is_last and not self._sent and (small := self._small()):
            self._clear(np.zeros(0, np.int64))
            yield small
            return
        row = self._row()
        rows = _rows_of(self._numbers_N, pack(self._sizes_N3, row))
        largest, first = CALL_ROWS[0] * self._shards, 0
        ends = len(rows) if is_last else len(rows) // largest * largest
        self._clear(np.sort(np.array([number for items in rows[ends:] for number in items], np.int64)))
        while first < ends:
            size = self._call_size(ends - first)
            yield Call(size, row, rows[first : min(first + size, ends)])
            first, self._sent = first + size, self._sent + size

    def _call_size(self, rows: int) -> int:
        """Return the size of the next call when this number of rows remain."""
        sizes = [size * self._shards for size in (CALL_ROWS if self._sent >= LONG * self._shards else CALL_ROWS[1:])]
        return next((size for size in sizes if size <= rows), self._shards)

    def _row(self) -> Size:
        # Without an image so far, rows have no patches, and the vision tower does not run.
        tokens, patches = self._size
        return row_size(tokens, patches if self._has_patches else 0, self._meta, self._budget)

    def _small(self) -> Call | None:
        small = row_size(SMALL, 0, self._meta, self._budget)
        if self._size[0] <= SMALL or not len(self._sizes_N3) or (self._sizes_N3 > np.array(small)).any():
            return None
        rows = _rows_of(self._numbers_N, pack(self._sizes_N3, small))
        return Call(self._shards, small, rows) if len(rows) <= self._shards else None

    def _clear(self, kept_N: Int[np.ndarray, "N"]) -> None:
        """Remove all items except these from the pool."""
        is_kept = np.isin(self._numbers_N, kept_N)
        self._numbers_N, self._sizes_N3 = self._numbers_N[is_kept], self._sizes_N3[is_kept]


def _rows_of(numbers_N: Int[np.ndarray, "N"], slots_N2: Int[np.ndarray, "N 2"]) -> list[list[int]]:
    """Return the items of each row by rank. Rows are in the order of their first items."""
    order = np.lexsort((slots_N2[:, 1], slots_N2[:, 0]))
    counts = np.bincount(slots_N2[:, 0])[:-1] if len(slots_N2) else []
    return [row.tolist() for row in np.split(numbers_N[order], np.cumsum(counts))] if len(slots_N2) else []
