"""Budgets: pairs (r_q, r_c) of how many query and candidate vectors a score uses."""

import itertools
from collections.abc import Sequence

from metaembed_jax.errors import UserError

Budget = tuple[int, int]

GROUPS: tuple[Budget, ...] = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))


def validate_groups(groups: Sequence[Sequence[int]], query_vectors: int, candidate_vectors: int) -> tuple[Budget, ...]:
    """The groups as a tuple of pairs, smallest first, once they are known to be nested.

    Nested: each group holds the one before it (neither side shrinks, and one side grows).

    Raises:
      UserError: no groups, not pairs of positive whole numbers, not nested, or beyond the vectors there are.
    """
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise UserError(f"groups={groups!r}: expected at least one pair (r_q, r_c), such as ((1, 1), (16, 64))")
    pairs = tuple(validate_budget(group, query_vectors, candidate_vectors) for group in groups)
    for smaller, larger in itertools.pairwise(pairs):
        if smaller == larger or smaller[0] > larger[0] or smaller[1] > larger[1]:
            raise UserError(f"groups not nested: {smaller} comes before {larger}; list them so that each holds the one before it")
    return pairs


def validate_budget(budget: Sequence[int], query_vectors: int, candidate_vectors: int) -> Budget:
    """One budget as a pair of ints.

    Raises:
      UserError: not a pair of positive whole numbers, or beyond the vectors there are.
    """
    try:
        query, candidate = (int(size) for size in budget)
        whole = query >= 1 and candidate >= 1 and [query, candidate] == list(budget)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"budget {budget!r}: expected a pair (r_q, r_c) of whole numbers from 1")
    if query > query_vectors or candidate > candidate_vectors:
        raise UserError(
            f"budget ({query}, {candidate}) goes beyond the vectors given: "
            f"{query_vectors} a query and {candidate_vectors} a candidate; lower it to those"
        )
    return query, candidate
