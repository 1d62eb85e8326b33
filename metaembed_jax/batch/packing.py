"""Assignment of items to packed rows: a pure function of sizes, the same on every host.

Best fit, largest first. An item's size has three dimensions, each a share of the capacity of a row. Items are taken in the order of
the sum of their shares, and go into the row that they fill best (by the same sum). With the recipe's mixture, other weights of the
dimensions change the rows of a step by at most one; the size of a row matters more.

N items, R rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from metaembed_jax.batch.items import Size
from metaembed_jax.errors import UserError

# Three sizes in one integer of 21-bit fields: an item fits where the subtraction leaves the top bit of each field set.
# With three separate comparisons, packing takes twice as long (16 ms instead of 8 for 1,152 items).
_LARGEST = (1 << 20) - 1
_FIELDS = np.array([1, 1 << 21, 1 << 42], np.int64)
_BORROWS = int(_FIELDS.sum()) << 20


class Fill(NamedTuple):
    """The used share of each dimension of some rows, 0 to 1; 0 for a dimension that rows do not have."""

    tokens: float
    patches: float
    vectors: float


def pack(sizes_N3: Int[np.ndarray, "N 3"], row: Size) -> Int[np.ndarray, "N 2"]:
    """Assign each item a row and a rank in it.

    Rows are numbered 0, 1, 2 ... in the order of their first items: large and small items spread over the hosts, which share the
    rows. Items of a row are ranked 0, 1, 2 ... in item order.

    Args:
      row: the capacity of every row.

    Returns:
      (row, rank) of each item.

    Raises:
      UserError: an item is larger than a row, or a row has more than 2**20 - 1 of a dimension.
    """
    sizes_N3 = np.asarray(sizes_N3, np.int64).reshape(-1, 3)
    capacity_3 = np.array(row, np.int64)
    _check(sizes_N3, capacity_3, row)
    rows_N = _best_fit(sizes_N3[None], capacity_3)[0]
    if len(rows_N) and rows_N.max() >= least_rows(sizes_N3, row):
        rows_N = min(rows_N, _next_fit(sizes_N3, capacity_3), key=np.max)
    return _ranked(rows_N)


def row_vectors(steps: Sequence[Int[np.ndarray, "_ 3"]], tokens: int, patches: int, least: int) -> int:
    """Choose the vectors of a row of so many tokens and patches: the smallest multiple of 16 that adds at most 0.5 % of rows.

    Args:
      steps: sizes of the items of some steps.
      least: the fewest vectors of a row.
    """

    def rows(vectors: int) -> int:
        return sum(int(pack(sizes_N3, Size(tokens, patches, vectors))[:, 0].max()) + 1 for sizes_N3 in steps)

    vectors = sum(int(sizes_N3[:, 2].sum()) for sizes_N3 in steps)
    fewest = rows(_LARGEST)
    chosen = -(-max(vectors // fewest, least) // 16) * 16
    while rows(chosen) > 1.005 * fewest:
        chosen += 16
    return chosen


def least_rows(sizes_N3: Int[np.ndarray, "N 3"], row: Size) -> int:
    """Return a lower bound of the rows that items need: as many as their total size fills."""
    totals = np.asarray(sizes_N3, np.int64).reshape(-1, 3).sum(axis=0).tolist()
    return max(-(-total // max(capacity, 1)) for total, capacity in zip(totals, row, strict=True))


def fill(sizes_N3: Int[np.ndarray, "N 3"], row: Size, rows: int) -> Fill:
    """Return the share of so many rows that these items use."""
    totals = np.asarray(sizes_N3, np.int64).reshape(-1, 3).sum(axis=0).tolist()
    return Fill(*(total / max(rows * capacity, 1) for total, capacity in zip(totals, row, strict=True)))


def best_fit_rows(steps: Sequence[Int[np.ndarray, "_ 3"]], row: Size) -> Int[np.ndarray, "S"]:
    """Return a tight upper bound of the rows that `pack` needs for each of some steps, computed for all of them together.

    Args:
      steps: sizes of the items of each step.

    Raises:
      UserError: as `pack`.
    """
    capacity_3 = np.array(row, np.int64)
    sizes_SN3 = np.zeros((len(steps), max(map(len, steps)), 3), np.int64)
    for sizes_N3, padded_N3 in zip(steps, sizes_SN3, strict=True):
        _check(sizes_N3, capacity_3, row)
        padded_N3[: len(sizes_N3)] = sizes_N3  # padding of size 0 comes last, and fits into any row
    return _best_fit(sizes_SN3, capacity_3).max(axis=1) + 1


def _check(sizes_N3: np.ndarray, capacity_3: np.ndarray, row: Size) -> None:
    if capacity_3.max() > _LARGEST:
        raise UserError(f"a row of {row}: expected at most {_LARGEST} of each")
    if (too_large_N := (sizes_N3 > capacity_3).any(axis=1)).any():
        item = int(too_large_N.argmax())
        raise UserError(f"item {item} is larger than a row: {Size(*sizes_N3[item].tolist())}; a row holds {row}")


def _best_fit(sizes_SN3: np.ndarray, capacity_3: np.ndarray) -> np.ndarray:
    """Return the row of each item, for S steps at the same time."""
    weights_3 = _LARGEST // np.maximum(capacity_3, 1)  # integers: sums of floats could differ between machines
    shares_SN, fields_SN = sizes_SN3 @ weights_3, sizes_SN3 @ _FIELDS
    free_shares_SR = np.full(shares_SN.shape, capacity_3 @ weights_3)  # as if every item had its own row
    free_fields_SR = np.full(shares_SN.shape, capacity_3 @ _FIELDS + _BORROWS)
    rows_SN, rows, none, steps_S = np.zeros(shares_SN.shape, np.int64), 0, 4 * _LARGEST, np.arange(len(shares_SN))
    for items_S in np.argsort(-shares_SN, axis=1, kind="stable").T:
        # An empty row is the most free, and comes after those in use: it is taken only if none of them has room.
        fields_S = fields_SN[steps_S, items_S]
        fits_SR = ((free_fields_SR[:, : rows + 1] - fields_S[:, None]) & _BORROWS) == _BORROWS
        best_S = np.where(fits_SR, free_shares_SR[:, : rows + 1], none).argmin(axis=1)
        free_fields_SR[steps_S, best_S] -= fields_S
        free_shares_SR[steps_S, best_S] -= shares_SN[steps_S, items_S]
        rows_SN[steps_S, items_S] = best_S
        rows = max(rows, int(best_S.max()) + 1)
    return rows_SN


def _next_fit(sizes_N3: np.ndarray, capacity_3: np.ndarray) -> np.ndarray:
    """Fill row after row in item order: rarely fewer rows than best fit, at most twice the needed rows in one dimension."""
    rows, row, free = [], 0, capacity_3.tolist()
    for size in sizes_N3.tolist():
        if any(x > y for x, y in zip(size, free, strict=True)):
            row, free = row + 1, capacity_3.tolist()
        free = [y - x for x, y in zip(size, free, strict=True)]
        rows.append(row)
    return np.array(rows, np.int64)


def _ranked(rows_N: np.ndarray) -> np.ndarray:
    """Number rows by their first items, and rank the items of each row."""
    _, first, rows_N, counts_R = np.unique(rows_N, return_index=True, return_inverse=True, return_counts=True)
    numbers_R = np.empty(len(first), np.int64)
    numbers_R[np.argsort(first)] = np.arange(len(first))
    order_N = np.argsort(rows_N, kind="stable")
    ranks_N = np.empty(len(rows_N), np.int64)
    ranks_N[order_N] = np.arange(len(rows_N)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    return np.stack([numbers_R[rows_N], ranks_N], axis=1)
