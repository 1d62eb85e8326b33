"""Budgets, pairs (r_q, r_c) of the query and document vectors that a score uses, and the groups of the loss."""

import itertools
from collections.abc import Sequence

from metaembed_jax.errors import UserError, shortened

Budget = tuple[int, int]

GROUPS: tuple[Budget, ...] = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))


def validate_groups(groups: Sequence[Sequence[int]], query_vectors: int, document_vectors: int) -> tuple[Budget, ...]:
    """Check that groups are nested, and return them as a tuple of pairs.

    Groups are nested if they ascend: from one group to the next, neither side shrinks, and at least one side grows.

    Raises:
      UserError: there are no groups, they are not nested, or one is not a pair of positive integers or has more vectors than the
        items.
    """
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise UserError(f"groups={shortened(groups)}: expected at least one pair (r_q, r_c), such as ((1, 1), (16, 64))")
    pairs = tuple(validate_budget(group, query_vectors, document_vectors) for group in groups)
    for smaller, larger in itertools.pairwise(pairs):
        if smaller == larger or smaller[0] > larger[0] or smaller[1] > larger[1]:
            raise UserError(f"groups not nested: {smaller} comes before {larger}; expected each group to hold the group before it")
    return pairs


def validate_budget(budget: Sequence[int], query_vectors: int, document_vectors: int) -> Budget:
    """Check a budget, and return it as a pair of ints.

    Raises:
      UserError: it is not a pair of positive integers, or has more vectors than the items.
    """
    try:
        query, document = (int(size) for size in budget)
        is_valid = query >= 1 and document >= 1 and [query, document] == list(budget)
    except (TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise UserError(f"budget {shortened(budget)}: expected a pair (r_q, r_c) of positive integers")
    if query > query_vectors or document > document_vectors:
        raise UserError(
            f"budget ({query}, {document}) goes beyond the vectors given; "
            f"expected at most {query_vectors} of a query and {document_vectors} of a document"
        )
    return query, document
