"""Searches in stages against their definition with sorted lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.stages import as_stages, largest_budget, search_in_stages


def scorer(tables, asked):
    """Return a function that scores by a table {budget: [Q, N]}, and appends the number of rows of each call to `asked`."""

    def score(budget, rows):
        asked.append(None if rows is None else rows.shape[1])
        return tables[budget] if rows is None else np.take_along_axis(tables[budget], rows, axis=1)

    return score


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.lists(st.integers(1, 14), max_size=3), st.integers(1, 14))
def test_equal_to_the_definition(seed, documents, survivors, k):
    random = np.random.default_rng(seed)
    stages = as_stages([*((n + 1, n + 1, s) for n, s in enumerate(survivors)), (9, 9)], 9, 9)
    tables = {stage[:2]: random.integers(-2, 3, (3, documents)) / 2 for stage in stages}  # with ties
    asked = []
    scores, rows = search_in_stages(scorer(tables, asked), stages, k)
    for q in range(3):
        best = range(documents)
        for stage, count in zip(stages, [*survivors, k], strict=True):
            best = sorted(sorted(best), key=lambda row: -tables[stage[:2]][q, row])[:count]
        assert rows[q].tolist() == best and scores[q].tolist() == [tables[9, 9][q, row] for row in best]
    expected = np.minimum.accumulate([documents, *survivors])
    assert asked == [None, *expected[1:]]  # no stage scores what did not survive


def test_all_surviving_is_the_last_stage_alone():
    tables = {(1, 1): np.random.default_rng(0).random((4, 30)), (2, 4): np.random.default_rng(1).random((4, 30))}
    whole = search_in_stages(scorer(tables, []), ((2, 4),), 10)
    staged = search_in_stages(scorer(tables, []), ((1, 1, 30), (2, 4)), 10)
    few, _ = search_in_stages(scorer(tables, []), ((1, 1, 5), (2, 4)), 10)
    np.testing.assert_array_equal(whole, staged)
    assert few.shape == (4, 5)


def test_as_stages():
    assert as_stages((4, 8), 16, 64) == ((4, 8),)
    assert as_stages([(1, 1, 1000), [16, 64]], 16, 64) == ((1, 1, 1000), (16, 64))
    assert as_stages(((4, 8),), 16, 64) == ((4, 8),)
    assert as_stages(np.array([4, 8]), 16, 64) == as_stages(np.array([[4, 8]]), 16, 64) == ((4, 8),)
    staged = as_stages([np.array([1, 1, 5]), (np.int64(4), 8)], 16, 64)
    assert staged == ((1, 1, 5), (4, 8)) and all(type(size) is int for stage in staged for size in stage)
    assert largest_budget([((1, 9, 50), (2, 4)), ((3, 1),)]) == (3, 9)


@pytest.mark.parametrize(
    "budget",
    [
        [],
        (),
        (4,),
        (4, 8, 10),
        5,
        None,
        "4:8",
        {4: 8},
        (float("inf"), 8),
        [(1, 1, 5), 7, (4, 8)],
        [(1, 1, 5), None],
        [(1, 1), (4, 8)],
        [(1, 1, 0), (4, 8)],
        [(1, 1, 5.0), (4, 8)],
        [(1, 1, 5), (17, 8)],
        [(1, 65, 5), (4, 8)],
    ],
)
def test_as_stages_refuses(budget):
    with pytest.raises(UserError):
        as_stages(budget, 16, 64)
