"""Scores of queries and documents by their ids, and marks of some of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Scores(NamedTuple):
    """Scores of queries and documents.

    Attributes:
      queries, documents: their ids.
      scores_QN: -inf where a query does not ask about a document.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    scores_QN: Float[np.ndarray, "Q N"]


def marked(queries: Sequence[str], documents: Sequence[str], named: Mapping[str, Iterable[str]]) -> Bool[np.ndarray, "Q N"]:
    """Mark the documents that are named for each query; names that no document has do not count."""
    marks_QN, columns = np.zeros((len(queries), len(documents)), bool), {name: column for column, name in enumerate(documents)}
    for row_N, query in zip(marks_QN, queries, strict=True):
        row_N[[columns[name] for name in named.get(query, ()) if name in columns]] = True
    return marks_QN
