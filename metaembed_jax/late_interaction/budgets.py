"""Budgets on the command line: "1:1,4:8,16:64", and searches in stages, "1:1:1000>16:64"."""

import re
from collections.abc import Iterable, Sequence

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages

SEARCH = re.compile(r"\s*(?:[0-9]{1,6}:[0-9]{1,6}:[0-9]{1,9}\s*>\s*)*[0-9]{1,6}:[0-9]{1,6}\s*")


def parse_searches(text: str, largest: Budget, flag: str = "--budgets") -> tuple[Stages, ...]:
    """Return the searches of a flag: "1:1,1:1:1000>16:64" -> (((1, 1),), ((1, 1, 1000), (16, 64))).

    Args:
      largest: the vectors that a query and a document have.
      flag: the flag, for errors.

    Raises:
      UserError: the text has another form, or a search is given twice or is larger than `largest`.
    """
    searches = []
    for name in text.split(","):
        if not SEARCH.fullmatch(name):
            raise UserError(
                f"{flag}={text}: {name!r} is not a pair r_q:r_c; expected for example 1:1,4:8,16:64 "
                "(or stages, r_q:r_c:survivors>r_q:r_c)"
            )
        try:
            search = as_stages(parse_name(name), *largest)
        except UserError as error:
            raise UserError(f"{flag}={text}: {error}") from error
        if search in searches:
            raise UserError(f"{flag}={text}: {search_name(search)} is given twice; leave one out")
        searches.append(search)
    return tuple(searches)


def parse_budgets(text: str, largest: Budget) -> tuple[Budget, ...]:
    """Return the budgets of a flag: "1:1,4:8" -> ((1, 1), (4, 8)).

    Raises:
      UserError: as `parse_searches`, or a search has stages.
    """
    searches = parse_searches(text, largest)
    for search in searches:
        if len(search) > 1:
            raise UserError(f"--budgets={text}: {search_name(search)} has stages, which only mteb's benchmarks take; leave it out")
    return tuple((search[0][0], search[0][1]) for search in searches)


def parse_name(name: str) -> Stages:
    """Return the stages of a valid name such as "1:1:1000>16:64"; inverse of `search_name`."""
    return tuple(tuple(map(int, stage.split(":"))) for stage in name.split(">"))


def search_name(stages: Stages) -> str:
    """Return the name of stages: ((1, 1, 1000), (16, 64)) -> "1:1:1000>16:64"."""
    return ">".join(map(budget_name, stages))


def budget_name(budget: Sequence[int]) -> str:
    """Return the name of a budget: (4, 8) -> "4:8"."""
    return ":".join(map(str, budget))


def by_cost(budgets: Iterable[Budget]) -> list[Budget]:
    """Sort budgets, cheapest first."""
    return sorted(((r_q, r_c) for r_q, r_c in budgets), key=lambda budget: (budget[0] * budget[1], budget[1]))


def in_order(searches: Iterable[Stages]) -> list[Stages]:
    """Return plain budgets, cheapest first, and then the searches in stages in their order."""
    searches = list(searches)
    plain = by_cost((search[0][0], search[0][1]) for search in searches if len(search) == 1)
    return [*((budget,) for budget in plain), *(search for search in searches if len(search) > 1)]
