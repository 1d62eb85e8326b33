"""Search in stages: the first stage scores all documents at a small budget, later stages score the survivors at larger budgets.

The vectors are nested, so one encoding serves every stage.

Q queries, N documents, K survivors of a stage, k results.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget, validate_budget


class Stage(NamedTuple):
    """A stage of a search, written (r_q, r_c, survivors) or (r_q, r_c, width, survivors), and the last (r_q, r_c) or with a width.

    Attributes:
      budget: the vectors to score.
      survivors: number of documents that the next stage scores; 0 in the last stage, whose documents are the results.
    """

    budget: Budget
    survivors: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers as they are written."""
        return (*self.budget.sizes, self.survivors) if self.survivors else self.budget.sizes

    def __str__(self) -> str:
        return f"{self.budget}:{self.survivors}" if self.survivors else str(self.budget)


Stages = tuple[Stage, ...]  # a plain search has one stage


def as_stages(budget: Sequence, largest: Budget) -> Stages:
    """Return a budget as stages: (4, 8) becomes one stage, and [(1, 1, 1000), (16, 64)] two. Stages are returned as they are.

    Args:
      largest: as for `validate_budget`.

    Raises:
      UserError: the budget has another form, or is larger than the items.
    """
    stages = [] if isinstance(budget, str) or not np.iterable(budget) else list(budget)
    if not stages:
        raise UserError(f"budget {budget!r}: expected a pair (r_q, r_c), or stages [(1, 1, 1000), (16, 64)]")
    *earlier, last = [_sizes(stage) for stage in (stages if np.iterable(stages[0]) else [budget])]
    validated = []
    for sizes in earlier:
        if len(sizes) not in (3, 4) or not isinstance(sizes[-1], int | np.integer) or sizes[-1] < 1:
            raise UserError(
                f"stage {sizes!r}: expected (r_q, r_c, survivors) or (r_q, r_c, width, survivors), where survivors are the "
                "documents that the next stage scores"
            )
        validated.append(Stage(validate_budget(sizes[:-1], largest), int(sizes[-1])))
    return *validated, Stage(validate_budget(last, largest))


def _sizes(stage) -> tuple:
    """Return the numbers of a stage as they are written."""
    if isinstance(stage, Stage):
        return stage.sizes
    return tuple(stage) if np.iterable(stage) else (stage,)


def largest_budget(searches: Sequence[Stages]) -> tuple[int, int]:
    """Return the most query vectors and the most document vectors that any of the searches uses."""
    query, document = (max(stage.budget[side] for stages in searches for stage in stages) for side in (0, 1))
    return query, document


def scored_documents(stages: Stages, documents: int) -> list[int]:
    """Return the number of documents that each stage scores, of all that are searched."""
    return [documents, *(min(stage.survivors, documents) for stage in stages[:-1])]


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
    for budget, survivors in earlier:
        _, rows = best(budget, rows, survivors)
        rows.sort(axis=1)  # so that the first row wins ties in the next stage too
    return best(last.budget, rows, k)
