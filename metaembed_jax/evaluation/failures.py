"""Choose the worst failures of a model from its scores."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.results import Failure, severity

WORST = 10  # failures to keep
SHOWN = 3  # right documents, and wrong documents, to keep of a failure


class Ranking(NamedTuple):
    """The n documents that a query is scored against.

    Attributes:
      documents: their numbers.
      scores: higher is better.
      relevant: true for right documents.
    """

    documents: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    relevant: Bool[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class FailedQuery:
    """A failure with its items, each {"text", "image"} with either or both, in place of numbers.

    Attributes:
      origin: the data set and the number of the query.
      query: the item.
      rank, among: as in `Failure`.
      right, above: (item, score), as in `Failure`.
    """

    origin: str
    query: dict
    rank: int
    among: int
    right: list[tuple[dict, float]]
    above: list[tuple[dict, float]]


def worst_queries(rankings: Iterable[Ranking], dataset: tuple[str, ...] = ()) -> tuple[Failure, ...]:
    """Choose the `WORST` failures by `Failure.severity`, worst first; of equal ones, the first query first.

    Args:
      rankings: the ranking of each query, in the order of their numbers.
      dataset: names of the benchmark, task and subset, as far as there are any.

    Raises:
      UserError: a score is NaN, or a query has no relevant document; names the query.
    """
    judged = ((_judge(query, ranking), query, ranking) for query, ranking in enumerate(rankings))
    missed = (entry for entry in judged if entry[0][0])
    worst = heapq.nlargest(WORST, missed, key=lambda entry: entry[0])  # stable, and holds no more rankings than it returns
    return tuple(_failure(dataset, query, ranking, rank) for (rank, _), query, ranking in worst)


def worst_of(failures: Iterable[Failure]) -> list[Failure]:
    """Choose the `WORST` of the failures of several data sets, worst first; of equal ones, the first one first."""
    return heapq.nlargest(WORST, failures, key=lambda failure: failure.severity)


def with_items(failure: Failure, queries: Sequence[dict], documents: Sequence[dict]) -> FailedQuery:
    """Look up the items of a failure."""

    def items(numbered: Sequence[tuple[int, float]]) -> list[tuple[dict, float]]:
        return [(documents[number], score) for number, score in numbered]

    return FailedQuery(
        origin=f"{', '.join(failure.dataset)}, query {failure.query}",
        query=queries[failure.query],
        rank=failure.rank,
        among=failure.among,
        right=items(failure.right),
        above=items(failure.above),
    )


def _judge(query: int, ranking: Ranking) -> tuple[int, float]:
    """Return `Failure.severity` of a query; its rank is 0 if the query is not a failure."""
    scores, relevant = np.asarray(ranking.scores, np.float64), ranking.relevant
    if np.isnan(scores).any():
        raise UserError(f"scores of query {query} hold NaN; look for NaN in the vectors or the checkpoint")
    if not relevant.any():
        raise UserError(f"query {query} has no relevant document; leave it out or add its documents")
    right, others = scores[relevant].max(), scores[~relevant]
    rank = int((others >= right).sum())
    return severity(rank, float(right), float(others.max())) if rank else (0, 0.0)


def _failure(dataset: tuple[str, ...], query: int, ranking: Ranking, rank: int) -> Failure:
    order = np.argsort(-np.asarray(ranking.scores, np.float64), kind="stable")

    def first(positions: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
        return tuple((int(ranking.documents[n]), float(ranking.scores[n])) for n in positions[:count])

    right, others = order[ranking.relevant[order]], order[~ranking.relevant[order]]
    right, above = first(right, SHOWN), first(others, min(rank, SHOWN))
    return Failure(dataset=dataset, query=query, rank=rank, among=len(order), right=right, above=above)
