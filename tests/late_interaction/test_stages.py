"""Searches in stages against their definition with sorted lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, largest_budget, scored_documents, search_in_stages

LARGEST = Budget(16, 64, 32)


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
    stages = as_stages([*((n + 1, n + 1, s) for n, s in enumerate(survivors)), (9, 9)], Budget(9, 9))
    tables = {stage.budget: random.integers(-2, 3, (3, documents)) / 2 for stage in stages}  # with ties
    asked = []
    scores, rows = search_in_stages(scorer(tables, asked), stages, k)
    for q in range(3):
        best = range(documents)
        for stage, count in zip(stages, [*survivors, k], strict=True):
            best = sorted(sorted(best), key=lambda row: -tables[stage.budget][q, row])[:count]
        assert rows[q].tolist() == best and scores[q].tolist() == [tables[Budget(9, 9)][q, row] for row in best]
    expected = np.minimum.accumulate([documents, *survivors])
    assert asked == [None, *expected[1:]]  # no stage scores what did not survive


def test_all_surviving_is_the_last_stage_alone():
    tables = {Budget(r, r): np.random.default_rng(r).random((4, 30)) for r in (1, 2)}
    whole, staged, few = (
        search_in_stages(scorer(tables, []), as_stages(budget, LARGEST), 10)
        for budget in ((2, 2), [(1, 1, 30), (2, 2)], [(1, 1, 5), (2, 2)])
    )
    np.testing.assert_array_equal(whole, staged)
    assert few[0].shape == (4, 5)


def test_as_stages():
    plain, staged = ((Budget(4, 8), 0),), ((Budget(1, 1), 1000), (Budget(16, 64), 0))
    for budget in ((4, 8), ((4, 8),), np.array([4, 8]), np.array([[4, 8]]), as_stages((4, 8), LARGEST)):
        assert as_stages(budget, LARGEST) == plain
    for budget in ([(1, 1, 1000), [16, 64]], [np.array([1, 1, 1000]), (np.int64(16), 64)]):
        assert as_stages(budget, LARGEST) == staged
        assert all(type(size) is int for stage in as_stages(budget, LARGEST) for size in (*stage.budget, stage.survivors))
    assert largest_budget([as_stages(budget, LARGEST) for budget in ([(1, 9, 50), (2, 4)], (3, 1))]) == (3, 9)


def test_stages_with_widths():
    assert as_stages((4, 8, 16), LARGEST) == ((Budget(4, 8, 16), 0),)
    stages = as_stages([(1, 1, 8, 1000), (2, 4, 16, 10), (16, 64)], LARGEST)
    assert stages == ((Budget(1, 1, 8), 1000), (Budget(2, 4, 16), 10), (Budget(16, 64), 0)) == as_stages(stages, LARGEST)
    assert [stage.sizes for stage in stages] == [(1, 1, 8, 1000), (2, 4, 16, 10), (16, 64)]
    assert scored_documents(stages, 100) == [100, 100, 10]
    assert as_stages((4, 8, 1000), LARGEST._replace(width=0)) == ((Budget(4, 8, 1000), 0),)  # the width is not known


@pytest.mark.parametrize(
    "budget",
    [
        [],
        (),
        (4,),
        (4, 8, 33),
        (4, 8, -1),
        (4, 8, 8, 10),
        [(1, 1, 33, 5), (4, 8)],
        [(1, 1, 8), (4, 8, 8, 9)],
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
        as_stages(budget, LARGEST)
