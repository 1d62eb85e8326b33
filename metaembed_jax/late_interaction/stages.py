"""Search in stages: the first scores all documents at a small budget, later ones score the survivors at larger budgets.

The vectors are nested, so one encoding serves every stage.

Q queries, N documents, K survivors of a stage, k results.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget, validate_budget

# (r_q, r_c, survivors) for every stage but the last, which is (r_q, r_c). A plain search has one stage.
Stages = tuple[tuple[int, ...], ...]


def as_stages(budget: Sequence, query_vectors: int, document_vectors: int) -> Stages:
    """Return a budget as stages: (4, 8) becomes ((4, 8),), and [(1, 1, 1000), (16, 64)] two stages.

    Raises:
      UserError: the budget has another form, or asks for more vectors than the items have.
    """
    stages = [] if isinstance(budget, str) or not np.iterable(budget) else list(budget)
    if not stages:
        raise UserError(f"budget {budget!r}: expected a pair (r_q, r_c), or stages [(1, 1, 1000), (16, 64)]")
    *earlier, last = stages if np.iterable(stages[0]) else [stages]
    validated = []
    for stage in earlier:
        sizes = tuple(stage) if np.iterable(stage) else ()
        if len(sizes) != 3 or not isinstance(sizes[2], int | np.integer) or sizes[2] < 1:
            raise UserError(
                f"stage {stage!r}: expected (r_q, r_c, survivors), with as many survivors as the next stage is to score"
            )
        validated.append((*validate_budget(sizes[:2], query_vectors, document_vectors), int(sizes[2])))
    return *validated, validate_budget(last, query_vectors, document_vectors)


def largest_budget(searches: Sequence[Stages]) -> Budget:
    """Return the most vectors that any of the searches uses on each side."""
    query, document = (max(stage[side] for stages in searches for stage in stages) for side in (0, 1))
    return query, document


def search_in_stages(
    score: Callable[[Budget, Int[np.ndarray, "Q K"] | None], Float[np.ndarray, "Q K"]], stages: Stages, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Return scores and rows of the k best documents of each query, best first; of ties, the first row.

    Args:
      score: `(budget, rows) -> scores` of the given rows of each query; of all N documents where rows is None.
      stages: from `as_stages`.
      k: fewer are returned where fewer survive.
    """
    rows = None
    for query_vectors, document_vectors, *survivors in stages:
        scores = score((query_vectors, document_vectors), rows)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : survivors[0] if survivors else k]
        if survivors:
            best.sort(axis=1)  # the first row wins ties in the next stage too
        rows = best if rows is None else np.take_along_axis(rows, best, axis=1)
    return np.take_along_axis(scores, best, axis=1), rows
