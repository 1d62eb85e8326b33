"""Which queries a model fails worst, chosen from its scores: pure functions, numbers in and numbers out."""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError

WORST = 10  # queries that are kept
SHOWN = 3  # candidates that are kept of a query, right ones and others each

Place = TypeVar("Place")  # where a miss is from


class Ranking(NamedTuple):
    """The n candidates that one query chooses among.

    Attributes:
      candidates: their numbers.
      scores: higher is better.
      relevant: which of them are right.
    """

    candidates: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    relevant: Bool[np.ndarray, " n"]


class Miss(NamedTuple):
    """A query that ranks something else before all that is right. Survives JSON (`Miss(**miss._asdict())`, tuples being lists).

    Attributes:
      query: its number.
      rank: of its first right candidate; 0 would be no miss. Behind all others of equal score, as in `metrics.gold_of`.
      among: how many candidates it chose among.
      wanted: (candidate, score) of up to `SHOWN` right ones, best first.
      found: the same of others that are ranked before them.
    """

    query: int
    rank: int
    among: int
    wanted: Sequence[tuple[int, float]]
    found: Sequence[tuple[int, float]]

    @property
    def severity(self) -> tuple[int, float]:
        """What misses are ordered by, the largest being the worst: the rank, then how much better the first one scores."""
        return _severity(self.rank, self.wanted[0][1], self.found[0][1])


class Example(NamedTuple):
    """A miss as people see it: with items, {"text", "image"} with either or both, in place of numbers.

    Attributes:
      place: where the query is from.
      query: its item.
      rank, among: as in `Miss`.
      wanted, found: (item, score), as in `Miss`.
    """

    place: str
    query: dict
    rank: int
    among: int
    wanted: list[tuple[dict, float]]
    found: list[tuple[dict, float]]


def worst_queries(rankings: Iterable[Ranking]) -> list[Miss]:
    """The `WORST` misses by `Miss.severity`, worst first, earlier queries first where it is equal; fewer if there are fewer.

    Args:
      rankings: of each query, in order; queries are numbered by it.

    Raises:
      UserError: a score is NaN, or a query has no relevant candidate; names the query.
    """
    judged = ((_judge(query, ranking), query, ranking) for query, ranking in enumerate(rankings))
    missed = (entry for entry in judged if entry[0][0])
    worst = heapq.nlargest(WORST, missed, key=lambda entry: entry[0])  # stable, and holds no more rankings than it returns
    return [_miss(query, ranking, severity[0]) for severity, query, ranking in worst]


def worst_of(misses: Iterable[tuple[Miss, Place]]) -> list[tuple[Miss, Place]]:
    """The `WORST` of misses from several places, by `Miss.severity`, worst first; of equal ones, those that come first."""
    return heapq.nlargest(WORST, misses, key=lambda pair: pair[0].severity)


def example(miss: Miss, queries: Sequence[dict], candidates: Sequence[dict], place: str) -> Example:
    """A miss with its items, which are the only ones that are looked up. place: of its queries, such as a data set and split."""

    def items(numbered):
        return [(candidates[number], score) for number, score in numbered]

    query = queries[miss.query]
    return Example(f"{place}, query {miss.query}", query, miss.rank, miss.among, items(miss.wanted), items(miss.found))


def _judge(query: int, ranking: Ranking) -> tuple[int, float]:
    """`Miss.severity` of a query; rank 0 if it is none."""
    scores, relevant = np.asarray(ranking.scores, np.float64), ranking.relevant
    if np.isnan(scores).any():
        raise UserError(f"scores of query {query} hold NaN; look for NaN in the vectors or the checkpoint")
    if not relevant.any():
        raise UserError(f"query {query} has no relevant candidate; leave it out or complete the gallery")
    right, others = scores[relevant].max(), scores[~relevant]
    rank = int((others >= right).sum())
    return _severity(rank, float(right), float(others.max())) if rank else (0, 0.0)


def _severity(rank: int, right: float, first: float) -> tuple[int, float]:
    return rank, 0.0 if first == right else first - right  # equal infinities have no difference


def _miss(query: int, ranking: Ranking, rank: int) -> Miss:
    order = np.argsort(-np.asarray(ranking.scores, np.float64), kind="stable")

    def first(positions, count):
        return [(int(ranking.candidates[n]), float(ranking.scores[n])) for n in positions[:count]]

    right, others = order[ranking.relevant[order]], order[~ranking.relevant[order]]
    return Miss(query, rank, len(order), first(right, SHOWN), first(others, min(rank, SHOWN)))
