"""Packing: every item in one row, no row over its capacity, few rows, the same every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.packing import Fill, best_fit_rows, fill, least_rows, pack
from metaembed_jax.errors import UserError

ROW = Size(40, 60, 20)


def sizes(largest=ROW):
    """Draw items up to the size of a row, with few distinct values: equal items and exact fits occur."""
    item = st.tuples(*(st.integers(0, x // 5).map(lambda n: 5 * n) | st.integers(0, x) for x in largest))
    return st.lists(item, max_size=60).map(lambda items: np.array(items, np.int64).reshape(-1, 3))


def next_fit(sizes_N3, row):
    rows, used = 0, np.array(row)
    for size in sizes_N3:
        rows, used = (rows, used + size) if (used + size <= row).all() and rows else (rows + 1, size)
    return rows


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_rows_hold_every_item_once_and_are_few(sizes_N3):
    packed_N2 = pack(sizes_N3, ROW)
    assert packed_N2.shape == (len(sizes_N3), 2)
    rows = sorted(set(packed_N2[:, 0].tolist()))
    assert rows == list(range(len(rows)))
    assert least_rows(sizes_N3, ROW) <= len(rows) <= next_fit(sizes_N3, ROW)
    for row in rows:
        items = np.flatnonzero(packed_N2[:, 0] == row)
        assert (sizes_N3[items].sum(axis=0) <= ROW).all()
        assert packed_N2[items, 1].tolist() == list(range(len(items)))
    np.testing.assert_array_equal(pack(sizes_N3.copy(), ROW), packed_N2)


@settings(max_examples=50, deadline=None)
@given(st.lists(sizes().filter(len), min_size=1, max_size=4))
def test_steps_packed_side_by_side_are_packed_as_each_alone(steps):
    bounds = best_fit_rows(steps, ROW)
    assert bounds.tolist() == [int(best_fit_rows([step], ROW)[0]) for step in steps]
    assert all(pack(step, ROW)[:, 0].max() < bound for step, bound in zip(steps, bounds.tolist(), strict=True))


@settings(max_examples=50, deadline=None)
@given(sizes())
def test_rows_are_numbered_by_their_first_items(sizes_N3):
    rows_N = pack(sizes_N3, ROW)[:, 0]
    firsts = [int(np.flatnonzero(rows_N == row)[0]) for row in range(rows_N.max(initial=-1) + 1)]
    assert firsts == sorted(firsts)


def test_large_items_share_rows_with_small_ones():
    sizes_N3 = np.array([(4, 0, 1), (30, 60, 1), (6, 0, 1), (30, 60, 1), (10, 0, 1)])
    assert pack(sizes_N3, ROW).tolist() == [[0, 0], [1, 0], [0, 1], [0, 2], [1, 1]]
    assert fill(sizes_N3, ROW, 2) == Fill(1.0, 1.0, 5 / 40)


def test_next_fit_where_best_fit_needs_more_rows():
    sizes_N3 = np.array([(tokens, 0, 0) for tokens in (3, 3, 4, 5, 2, 3)])
    assert pack(sizes_N3, Size(10, 1, 1)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_bounds():
    assert pack(np.zeros((0, 3), int), ROW).shape == (0, 2)
    assert fill(np.zeros((0, 3), int), Size(8, 0, 8), 2) == Fill(0, 0, 0)
    assert pack(np.array([ROW, ROW]), ROW).tolist() == [[0, 0], [1, 0]]
    with pytest.raises(UserError, match="item 1 is larger than a row: 41 tokens, 0 patches, 1 vectors; a row holds 40 tokens, 60 "):
        pack(np.array([(1, 1, 1), (41, 0, 1), (99, 0, 1)]), ROW)
    with pytest.raises(UserError, match="a row of 1048576 tokens, 8 patches, 8 vectors: expected at most 1048575 of each"):
        pack(np.array([(1, 1, 1)]), Size(1 << 20, 8, 8))
    largest = Size(*[(1 << 20) - 1] * 3)
    assert pack(np.array([largest, (1, 0, 0), (0, 0, 1)]), largest).tolist() == [[0, 0], [1, 0], [1, 1]]
