"""Checks of a search: its queries, budget and number of results.

Q queries, R vectors of a query, D width of a vector.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.retrieval.ingest import as_array, check_unit

RESULTS = 10  # of a search, by default


def as_queries(query_QRD, width: int) -> Float[np.ndarray, "Q R D"]:
    """Check query vectors, and return them as float32.

    Raises:
      UserError: they have another shape, or a vector's length is not one.
    """
    query_QRD = as_array(query_QRD, "queries")
    if query_QRD.ndim != 3 or query_QRD.shape[2] != width or not query_QRD.shape[1]:
        raise UserError(f"queries have the shape {query_QRD.shape}: expected [queries, vectors, {width}] for this index")
    query_QRD = query_QRD.astype(np.float32)
    queries, vectors, _ = query_QRD.shape
    check_unit(query_QRD, np.full(queries, vectors), [f"query {number}" for number in range(queries)])
    return query_QRD


def stages_of(budget: Budget | Sequence | None, query_vectors: int, stored: int) -> Stages:
    """Return a budget as stages; all vectors by default.

    Raises:
      UserError: the budget has another form, or more vectors than the queries or the stored items.
    """
    try:
        return as_stages((query_vectors, stored) if budget is None else budget, query_vectors, stored)
    except UserError as error:
        raise UserError(f"{error} (this index stores {stored} vectors an item)") from None


def check_k(k: int, items: int, stages: Stages) -> None:
    """Check a number of results.

    Raises:
      UserError: it is not between 1 and the number of items, or above the survivors of a stage.
    """
    most = most_results(items, stages)
    if not isinstance(k, int | np.integer) or not 1 <= k <= most:
        limit = "the number of items" if most == items else "the survivors of a stage"
        raise UserError(f"k={k!r}: expected 1 to {most}, {limit}")


def most_results(items: int, stages: Stages) -> int:
    """Return the most results that a search in some items can have."""
    return min([items, *(stage[2] for stage in stages[:-1])])
