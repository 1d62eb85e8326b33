"""Budgets (r_q, r_c, width), the vectors of a query and of a document that a score uses, cut to a width; and groups of the loss."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from metaembed_jax.errors import UserError, shortened

GROUPS: tuple[tuple[int, int], ...] = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))
UNBOUNDED = 2**31  # compares as the width of all numbers


class Budget(NamedTuple):
    """The first vectors of a query and of a document, and the first numbers of each vector.

    A vector that is cut is divided by the length of what is left, so that it is a unit vector again.

    Attributes:
      query, document: numbers of vectors, r_q and r_c.
      width: numbers of each vector; 0: all.
    """

    query: int
    document: int
    width: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers as they are written and stored: (4, 8), and (4, 8, 32) with a width."""
        return tuple(self) if self.width else self[:2]

    def numbers(self, full: int) -> int:
        """Return how many of the `full` numbers of each vector are used."""
        return self.width or full

    def __str__(self) -> str:
        return f"{self.query}:{self.document}" + (f"x{self.width}" if self.width else "")


def validate_groups(groups: Sequence[Sequence[int]], largest: Budget) -> tuple[Budget, ...]:
    """Check that groups are nested, and return them as budgets.

    Groups are nested if the numbers of vectors ascend among those of one width: from one group to the next, neither side shrinks,
    and at least one grows. The last group holds all others, in vectors and in width.

    Args:
      largest: as for `validate_budget`.

    Raises:
      UserError: there are no groups, they are not nested, or one is not a budget or is larger than the items.
    """
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise UserError(f"groups={shortened(groups)}: expected at least one pair (r_q, r_c), such as ((1, 1), (16, 64))")
    budgets = tuple(validate_budget(group, largest) for group in groups)
    for width in {budget.width for budget in budgets}:
        for smaller, larger in itertools.pairwise(budget for budget in budgets if budget.width == width):
            if smaller == larger or not _holds(larger, smaller):
                raise UserError(
                    f"groups not nested: {smaller.sizes} comes before {larger.sizes}; expected each group to hold the one before"
                )
    last = budgets[-1]
    for budget in budgets:
        if not _holds(last, budget):
            raise UserError(f"groups not nested: {last.sizes} is last, and does not hold {budget.sizes}; expected the largest last")
    return budgets


def _holds(larger: Budget, smaller: Budget) -> bool:
    """Return whether `larger` has all the vectors and numbers of `smaller`."""
    is_as_wide = larger.numbers(UNBOUNDED) >= smaller.numbers(UNBOUNDED)
    return larger.query >= smaller.query and larger.document >= smaller.document and is_as_wide


def validate_budget(budget: Sequence[int], largest: Budget) -> Budget:
    """Check a budget (r_q, r_c) or (r_q, r_c, width), and return it.

    Args:
      largest: the vectors that a query and a document have, and the numbers of a vector; 0: not known.

    Raises:
      UserError: it has another form, or is larger than the items.
    """
    try:
        checked = Budget(*(int(size) for size in budget))
        is_valid = list(checked)[: len(budget)] == list(budget) and min(checked.query, checked.document) >= 1 and checked.width >= 0
    except (TypeError, ValueError, OverflowError):
        checked, is_valid = largest, False
    if not is_valid:
        raise UserError(f"budget {shortened(budget)}: expected a pair (r_q, r_c) or (r_q, r_c, width) of positive integers")
    if checked.query > largest.query or checked.document > largest.document:
        raise UserError(
            f"budget {checked.sizes} goes beyond the vectors given; "
            f"expected at most {largest.query} of a query and {largest.document} of a document"
        )
    if largest.width and checked.width > largest.width:
        raise UserError(f"budget {checked.sizes} has a width beyond the vectors given; expected at most {largest.width} numbers")
    return checked
