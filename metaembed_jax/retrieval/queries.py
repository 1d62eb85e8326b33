"""Checks of a search: its queries, budget and number of results.

Q queries, R vectors of a query, D width of a vector.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.pooling import count_vectors
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.retrieval.ingest import as_array, check_unit

RESULTS = 10  # of a search, by default


def as_queries(query_QRD, width: int) -> Float[np.ndarray, "Q R D"]:
    """Check query vectors, and return them as float32. Zeros after the last vector of a query are padding, which scores 0.

    Raises:
      UserError: they have another shape, or a vector's length is not one.
    """
    query_QRD = as_array(query_QRD, "queries")
    if query_QRD.ndim != 3 or query_QRD.shape[2] != width or not query_QRD.shape[1]:
        raise UserError(f"queries have the shape {query_QRD.shape}: expected [queries, vectors, {width}] for this index")
    query_QRD = query_QRD.astype(np.float32)
    counts_Q = np.maximum(count_vectors(query_QRD), 1)
    check_unit(query_QRD, counts_Q, [f"query {number}" for number in range(len(query_QRD))])
    return query_QRD


def stages_of(budget: Sequence | None, stored: Budget) -> Stages:
    """Return a budget as stages; all vectors by default.

    Args:
      stored: vectors of the queries and of the stored items, and their width.

    Raises:
      UserError: the budget has another form, or is larger than the queries or the stored items.
    """
    try:
        return as_stages(stored[:2] if budget is None else budget, stored)
    except UserError as error:
        raise UserError(f"{error} (this index stores {stored.document} vectors an item)") from None


def count_results(k: int | None, items: int, stages: Stages, is_filtered: bool = False) -> int:
    """Return the number of results of a search: k, by default `RESULTS`, or fewer if there cannot be as many.

    Args:
      items: number of items in the index.
      is_filtered: k may be larger than the number of items, because a filter leaves fewer anyway.

    Raises:
      UserError: k is not a positive integer, or is above the number of items or the survivors of a stage.
    """
    survivors = [stage.survivors for stage in stages[:-1]]
    if k is None:
        return min([RESULTS, items, *survivors])
    limits = survivors if is_filtered else [*survivors, items]
    if not isinstance(k, int | np.integer) or k < 1 or any(k > limit for limit in limits):
        most = min(limits, default=0)
        limit = "the survivors of a stage" if most in survivors else "the number of items"
        raise UserError(f"k={k!r}: expected " + (f"1 to {most}, {limit}" if most else "a positive integer"))
    return int(k)
