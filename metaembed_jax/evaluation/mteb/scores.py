"""Scores of queries and documents by their ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Scores(NamedTuple):
    """Scores of queries and documents.

    Attributes:
      queries, documents: their ids.
      scores_QN: -inf for documents that are not ranked for a query.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    scores_QN: Float[np.ndarray, "Q N"]


def marked(queries: Sequence[str], documents: Sequence[str], named: Mapping[str, Iterable[str]]) -> Bool[np.ndarray, "Q N"]:
    """Mark the documents that are named for each query; unknown names are ignored."""
    marks_QN, columns = np.zeros((len(queries), len(documents)), bool), {name: column for column, name in enumerate(documents)}
    for row_N, query in zip(marks_QN, queries, strict=True):
        row_N[[columns[name] for name in named.get(query, ()) if name in columns]] = True
    return marks_QN
