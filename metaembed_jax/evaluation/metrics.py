"""Retrieval metrics in NumPy, one value per query, and their bootstrap intervals.

Relevance is binary, or graded: the grade is the gain of a document. Ties count against the model: of equal scores the less relevant
document is ranked first. The values equal `success_k` and `ndcg_cut_k` of pytrec_eval, if its ids, which order ties, rank equal
scores the same way.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError


class Gold(NamedTuple):
    """Ranks of one query's G relevant documents, best first.

    Attributes:
      ranks: among all documents, 0 is best.
      gains: their grades.
    """

    ranks: Int[np.ndarray, " G"]
    gains: Int[np.ndarray, " G"]


def relevance_matrix(
    relevance: np.ndarray | Sequence[Iterable[int]], shape: tuple[int, int]
) -> Bool[np.ndarray, "Q N"] | Int[np.ndarray, "Q N"]:
    """Return relevance as a matrix.

    Args:
      relevance: a matrix of bool or of grades from 0, or for each query the indices of its relevant documents.

    Raises:
      UserError: a matrix of another shape or dtype, a wrong number of sets, or an index outside 0..N-1.
    """
    queries, documents = shape
    if isinstance(relevance, np.ndarray):
        if relevance.shape != shape or relevance.dtype.kind not in "biu" or (relevance < 0).any():
            raise UserError(
                f"relevance is {relevance.dtype} {relevance.shape}: expected bool, or whole grades from 0, of shape {shape}"
            )
        return relevance
    if len(relevance) != queries:
        raise UserError(f"relevance has {len(relevance)} sets for {queries} queries: expected a set for each query")
    matrix = np.zeros(shape, bool)
    for query, relevant in enumerate(relevance):
        for document in relevant:
            if not 0 <= document < documents:
                raise UserError(f"relevance of query {query} names document {document}: expected 0 to {documents - 1}")
            matrix[query, document] = True
    return matrix


def gold_of(scores: np.ndarray, relevance: np.ndarray | Sequence[Iterable[int]]) -> list[Gold]:
    """Rank each query's relevant documents.

    Args:
      scores: real [Q, N], higher is better; infinities are ranked like any number.
      relevance: as in `relevance_matrix`.

    Raises:
      UserError: no query, a NaN score, or a query without any relevant document.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or not len(scores):
        raise UserError(f"scores have shape {scores.shape}: expected [queries, documents] with at least one query")
    relevance = relevance_matrix(relevance, scores.shape)
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise UserError(
            f"scores of query {bad[0]} hold NaN ({len(bad)} such queries); look for NaN in the vectors or the checkpoint"
        )
    if len(bad := np.flatnonzero(~relevance.any(axis=1))):
        raise UserError(f"query {bad[0]} has no relevant document ({len(bad)} such queries); leave them out or add their documents")
    return [_gold(row, grades) for row, grades in zip(scores, relevance, strict=True)]


def _gold(scores: np.ndarray, grades: np.ndarray) -> Gold:
    """Rank the relevant documents, best first: each after all others of at least its score, and after better relevant ones.

    Only relevant scores are sorted, so this is O(N log G); ranking all documents would be O(N log N).
    """
    relevant = grades > 0
    gold, gains = scores[relevant], grades[relevant].astype(np.int64)
    order = np.lexsort((-gains, gold))  # worst first
    not_above = np.searchsorted(gold[order], scores[~relevant], side="right")  # relevant documents that each other one precedes
    others_before = np.bincount(not_above, minlength=len(gold) + 1)[::-1].cumsum()[:-1]  # best first
    return Gold(others_before + np.arange(len(gold)), gains[order[::-1]])


def hit_at(gold: Sequence[Gold], k: int) -> Float[np.ndarray, " Q"]:
    """Return 1 where any relevant document is among the first k, else 0. For k = 1 this is the precision too.

    This is "R@k" of image-text retrieval (success_k of pytrec_eval), not the share of relevant documents among the first k.
    """
    return np.array([ranks[0] < k for ranks, _ in gold], np.float64)


def ndcg_at(gold: Sequence[Gold], k: int) -> Float[np.ndarray, " Q"]:
    """Return the discounted gain of the first k over that of the best possible order (ndcg_cut_k of pytrec_eval)."""
    discount = 1 / np.log2(np.arange(k) + 2)
    values = []
    for ranks, gains in gold:
        first, ideal = ranks < k, np.sort(gains)[::-1][:k]
        values.append(gains[first] @ discount[ranks[first]] / (ideal @ discount[: len(ideal)]))
    return np.array(values)


class Metric(NamedTuple):
    """A metric.

    Attributes:
      meaning: explanation of its mean, for the reader of a table.
      values: the metric of each query, from its gold.
    """

    meaning: str
    values: Callable[[Sequence[Gold]], Float[np.ndarray, " Q"]]


# In the order of the tables. All results have all of these metrics, and `config.evaluation.select` may name each.
METRICS = {
    "R@1": Metric("queries with a right document first", partial(hit_at, k=1)),
    "R@5": Metric("with one among the first 5", partial(hit_at, k=5)),
    "R@10": Metric("with one among the first 10", partial(hit_at, k=10)),
    "nDCG@10": Metric("the discounted gain of the first 10", partial(ndcg_at, k=10)),
}


def saturated_metrics(documents: int) -> list[str]:
    """Return the metrics that are 1 for every ranking of so few documents."""
    return [name for name in METRICS if documents == 1 or (name.startswith("R@") and documents <= int(name.removeprefix("R@")))]


def evaluate(scores: np.ndarray, relevance: np.ndarray | Sequence[Iterable[int]]) -> dict[str, np.ndarray]:
    """Return every metric of METRICS, per query: {"R@1": float64 [Q], ...}. Arguments and errors are those of `gold_of`."""
    gold = gold_of(scores, relevance)
    return {name: metric.values(gold) for name, metric in METRICS.items()}


def bootstrap_mean(values: np.ndarray, seed: int, samples: int = 10_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means over the queries and their 95 % percentile intervals, (mean, low, high), each float64 [...].

    Args:
      values: real [..., Q]. All rows are resampled together, by query.
    """
    values = np.asarray(values, np.float64)
    rows_KQ = values.reshape(-1, values.shape[-1])
    queries, random, means = values.shape[-1], np.random.default_rng(seed), []
    block = max(1, 4_000_000 // queries)  # bounds the memory of the draws
    for start in range(0, samples, block):
        size = min(block, samples - start)
        draws = random.integers(queries, size=(size, queries)) + queries * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * queries).reshape(size, queries)
        means.append(counts.astype(np.float64) @ rows_KQ.T / queries)  # the weight of a query is how often it is drawn
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0).reshape(2, *values.shape[:-1])
    return values.mean(axis=-1), low, high
