"""Groups of the loss, nested in counts and in width."""

import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_budget, validate_groups

LARGEST = Budget(16, 64, 32)


@pytest.mark.parametrize(
    "groups",
    [
        GROUPS,
        ((1, 1, 8),),
        ((1, 1), (2, 4, 8), (2, 4), (16, 64, 8), (16, 64, 16), (16, 64)),  # few vectors in full, before many that are narrow
        ((1, 1, 8), (1, 1, 16), (1, 4, 8), (2, 4, 16)),
        ((1, 1, 8), (16, 64, 8), (1, 1, 16), (16, 64, 16)),  # width by width
        ((2, 4, 8), (1, 1, 16), (1, 1, 4), (2, 4)),
        [[1, 1], [16, 64, 0]],
        ((1, 1, 32), (16, 64, 8), (16, 64, 32)),
    ],
)
def test_nested(groups):
    budgets = validate_groups(groups, LARGEST)
    assert budgets == tuple(Budget(*group) for group in groups) == validate_groups(budgets, LARGEST._replace(width=0))
    assert [list(budget.sizes) for budget in budgets] == [list(group) if group[2:] != [0] else list(group[:2]) for group in groups]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((1, 1), (1, 1, 8)), "not nested"),
        (((1, 1, 8), (1, 1, 8)), "not nested"),
        (((1, 1, 16), (1, 1, 8), (2, 2), (2, 1)), r"\(2, 2\) comes before \(2, 1\)"),
        (((2, 4, 8), (1, 8, 16)), r"\(1, 8, 16\) is last, and does not hold \(2, 4, 8\)"),
        (((1, 1), (2, 4, 8)), "the largest last"),
        (((1, 1, 16), (2, 4, 8)), "the largest last"),
        (((2, 2, 8), (1, 1, 8), (2, 2)), r"\(2, 2, 8\) comes before \(1, 1, 8\)"),
        (((1, 1, 33), (2, 4)), "33.* width beyond .* 32 numbers"),
        (((1, 1, -8), (2, 4)), "positive integers"),
        (((1, 1, 8.5), (2, 4)), "positive integers"),
        (((1, 1, 8, 8), (2, 4)), "positive integers"),
    ],
)
def test_not_nested(groups, message):
    with pytest.raises(UserError, match=message):
        validate_groups(groups, LARGEST)


def test_numbers_of_a_budget():
    assert [budget.numbers(32) for budget in (Budget(1, 1), Budget(1, 1, 8), Budget(1, 1, 32))] == [32, 8, 32]
    assert validate_budget((2, 4, 1000), LARGEST._replace(width=0)) == (2, 4, 1000)  # the width is not known
