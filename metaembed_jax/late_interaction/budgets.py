"""Budgets on the command line: "1:1,4:8,16:64", "16:64x32" with 32 numbers of a vector, and stages, "1:1x32:1000>16:64"."""

import re
from collections.abc import Iterable, Sequence

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stage, Stages, as_stages

BUDGET = r"[0-9]{1,6}:[0-9]{1,6}(?:x[1-9][0-9]{0,5})?"
SEARCH = re.compile(rf"\s*(?:{BUDGET}:[0-9]{{1,9}}\s*>\s*)*{BUDGET}\s*")


def parse_searches(text: str, largest: Budget, flag: str = "--budgets") -> tuple[Stages, ...]:
    """Return the searches of a flag: "1:1,1:1:1000>16:64" has a plain search and one of two stages.

    Args:
      largest: as for `validate_budget`.
      flag: the flag, for errors.

    Raises:
      UserError: the text has another form, or a search is given twice or is larger than `largest`.
    """
    searches = []
    for name in text.split(","):
        if not SEARCH.fullmatch(name):
            raise UserError(
                f"{flag}={text}: {name!r} is not a pair r_q:r_c; expected for example 1:1,4:8,16:64 "
                "(or r_q:r_c x width, 16:64x32, or stages, r_q:r_c:survivors>r_q:r_c)"
            )
        try:
            search = as_stages(parse_name(name), largest)
        except UserError as error:
            raise UserError(f"{flag}={text}: {error}") from error
        if search in searches:
            raise UserError(f"{flag}={text}: {search_name(search)} is given twice; leave one out")
        searches.append(search)
    return tuple(searches)


def parse_budgets(text: str, largest: Budget) -> tuple[Budget, ...]:
    """Return the budgets of a flag: "1:1,4:8x32" -> ((1, 1), (4, 8, 32)).

    Raises:
      UserError: as `parse_searches`, or a search has stages.
    """
    searches = parse_searches(text, largest)
    for search in searches:
        if len(search) > 1:
            raise UserError(f"--budgets={text}: {search_name(search)} has stages, which only mteb's benchmarks take; leave it out")
    return tuple(search[0].budget for search in searches)


def parse_name(name: str) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of each stage of a valid name such as "1:1x32:1000>16:64", for `as_stages`; inverse of `search_name`."""
    return tuple(tuple(map(int, re.split("[:x]", stage))) for stage in name.split(">"))


def search_name(stages: Stages) -> str:
    """Return the name of stages, such as "1:1x32:1000>16:64"."""
    return ">".join(map(str, stages))


def budget_name(budget: Sequence[int]) -> str:
    """Return the name of a budget: (4, 8) -> "4:8", (4, 8, 32) -> "4:8x32"."""
    return str(Budget(*budget))


def by_cost(budgets: Iterable[Budget], width: int) -> list[Budget]:
    """Sort budgets by the products of a score, cheapest first, then by the numbers of a document.

    Args:
      width: numbers of a vector.
    """

    def cost(budget: Budget) -> tuple[int, int]:
        numbers = budget.document * budget.numbers(width)
        return budget.query * numbers, numbers

    return sorted(budgets, key=cost)


def in_order(searches: Iterable[Stages], width: int) -> list[Stages]:
    """Return plain budgets, cheapest first, and then the searches in stages in their order.

    Args:
      width: numbers of a vector.
    """
    searches = list(searches)
    plain = by_cost((search[0].budget for search in searches if len(search) == 1), width)
    return [*((Stage(budget),) for budget in plain), *(search for search in searches if len(search) > 1)]
