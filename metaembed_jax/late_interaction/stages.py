"""Search in stages: the first stage scores all documents at a small budget, later stages score the survivors at larger budgets.

The vectors are nested, so one encoding serves every stage.

Q queries, N documents, K survivors of a stage, k results.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget, validate_budget

# (r_q, r_c, survivors) of every stage except the last, which is (r_q, r_c). A plain search has one stage.
Stages = tuple[tuple[int, ...], ...]


def as_stages(budget: Sequence, query_vectors: int, document_vectors: int) -> Stages:
    """Return a budget as stages: (4, 8) becomes ((4, 8),), and [(1, 1, 1000), (16, 64)] two stages.

    Raises:
      UserError: the budget has another form, or more vectors than the items.
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
                f"stage {stage!r}: expected (r_q, r_c, survivors), where survivors are the documents that the next stage scores"
            )
        validated.append((*validate_budget(sizes[:2], query_vectors, document_vectors), int(sizes[2])))
    return *validated, validate_budget(last, query_vectors, document_vectors)


def largest_budget(searches: Sequence[Stages]) -> Budget:
    """Return the most query vectors and the most document vectors that any of the searches uses."""
    query, document = (max(stage[side] for stages in searches for stage in stages) for side in (0, 1))
    return query, document


def search_in_stages(
    score: Callable[[Budget, Int[np.ndarray, "Q K"] | None], Float[np.ndarray, "Q K"]], stages: Stages, k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """Return scores and rows of the k best documents of each query, best first; of ties, the first row.

    Args:
      score: `(budget, rows) -> scores` of the given rows for each query; of all N documents if rows is None.
      stages: from `as_stages`.
      k: number of documents; fewer are returned if fewer survive.
    """

    def best(budget: Budget, rows: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
        scores = score(budget, rows)
        columns = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        rows = columns if rows is None else np.take_along_axis(rows, columns, axis=1)
        return np.take_along_axis(scores, columns, axis=1), rows

    *earlier, last = stages
    rows = None
    for query_vectors, document_vectors, survivors in earlier:
        _, rows = best((query_vectors, document_vectors), rows, survivors)
        rows.sort(axis=1)  # so that the first row wins ties in the next stage too
    query_vectors, document_vectors = last
    return best((query_vectors, document_vectors), rows, k)
