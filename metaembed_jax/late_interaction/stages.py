"""Search in stages: all candidates at a small budget, then those that survive again at larger ones.

The vectors are nested, so one encoding serves every stage.

Q queries, N candidates, K of them that survived, k that are kept in the end.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget, validate_budget

# (r_q, r_c, survivors) of every stage but the last, which is (r_q, r_c). One stage is the plain search.
Stages = tuple[tuple[int, ...], ...]


def as_stages(budget: Sequence, query_vectors: int, candidate_vectors: int) -> Stages:
    """A budget as stages: (4, 8) is ((4, 8),), and [(1, 1, 1000), (16, 64)] is a search in two stages.

    Raises:
      UserError: neither of these, or beyond the vectors there are.
    """
    stages = [] if isinstance(budget, str) or not np.iterable(budget) else list(budget)
    if not stages:
        raise UserError(f"budget {budget!r}: no stage given; write a pair (r_q, r_c), or stages [(1, 1, 1000), (16, 64)]")
    *earlier, last = stages if np.iterable(stages[0]) else [stages]
    checked = []
    for stage in earlier:
        sizes = tuple(stage) if np.iterable(stage) else ()
        if len(sizes) != 3 or not isinstance(sizes[2], int | np.integer) or sizes[2] < 1:
            raise UserError(f"stage {stage!r}: expected (r_q, r_c, survivors), where the next stage scores so many of them again")
        checked.append((*validate_budget(sizes[:2], query_vectors, candidate_vectors), int(sizes[2])))
    return *checked, validate_budget(last, query_vectors, candidate_vectors)


def largest_budget(searches: Sequence[Stages]) -> Budget:
    """The vectors that some searches need of each side."""
    query, candidate = (max(stage[side] for stages in searches for stage in stages) for side in (0, 1))
    return query, candidate


def search_in_stages(
    score: Callable[[Budget, Int[np.ndarray, "Q K"] | None], Float[np.ndarray, "Q K"]], stages: Stages, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Scores and rows of the k best candidates of each query, best first; of ties, the first row.

    Args:
      score: what the rows of each query score at a budget; of None, what all N candidates do.
      stages: of `as_stages`.
      k: at most so many; a candidate that did not survive is never returned.
    """
    rows = None
    for query_vectors, candidate_vectors, *survivors in stages:
        scores = score((query_vectors, candidate_vectors), rows)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : survivors[0] if survivors else k]
        if survivors:
            best.sort(axis=1)  # so that the first row wins ties in the next stage too
        rows = best if rows is None else np.take_along_axis(rows, best, axis=1)
    return np.take_along_axis(scores, best, axis=1), rows
