"""Retrieval metrics in plain NumPy, one value per query, and their bootstrap intervals.

Relevance is binary, or graded: the grade is what a candidate gains. A tie never favours: of equal scores the less relevant is
ranked first, so a model that gives everything one score gets what it deserves. The values equal pytrec_eval's `success_k`,
`recall_k` and `ndcg_cut_k`, with ids (by which it orders ties) that rank equal scores so.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError

METRICS = ("R@1", "R@5", "R@10", "nDCG@10")


class Gold(NamedTuple):
    """What one query has to find: its G relevant candidates, best ranked first.

    Attributes:
      ranks: among all candidates, 0 is best.
      gains: their grades.
    """

    ranks: Int[np.ndarray, " G"]
    gains: Int[np.ndarray, " G"]


def relevance_matrix(
    relevance: np.ndarray | Sequence[Iterable[int]], shape: tuple[int, int]
) -> Bool[np.ndarray, "Q N"] | Int[np.ndarray, "Q N"]:
    """Relevance as a matrix: bool or grades from 0 already, or for each query the indices of its relevant candidates.

    Raises UserError for a matrix of another shape or kind, a wrong number of sets, and an index outside 0..N-1.
    """
    queries, candidates = shape
    if isinstance(relevance, np.ndarray):
        if relevance.shape != shape or relevance.dtype.kind not in "biu" or (relevance < 0).any():
            raise UserError(
                f"relevance is {relevance.dtype} {relevance.shape}, but the scores need bool, or whole grades from 0, {shape}"
            )
        return relevance
    if len(relevance) != queries:
        raise UserError(f"relevance has {len(relevance)} sets for {queries} queries; give one set per query")
    matrix = np.zeros(shape, bool)
    for query, relevant in enumerate(relevance):
        for candidate in relevant:
            if not 0 <= candidate < candidates:
                raise UserError(
                    f"relevance of query {query} names candidate {candidate}, but there are {candidates} (0 to {candidates - 1})"
                )
            matrix[query, candidate] = True
    return matrix


def gold_of(scores: np.ndarray, relevance: np.ndarray | Sequence[Iterable[int]]) -> list[Gold]:
    """The ranks that each query's relevant candidates take.

    scores: real [Q, N], higher is better (infinities are ranked like any number); relevance: see `relevance_matrix`.
    Raises UserError when there is no query, for a NaN score, and for a query without any relevant candidate.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or not len(scores):
        raise UserError(f"scores have shape {scores.shape}; they must be [queries, candidates] with at least one query")
    relevance = relevance_matrix(relevance, scores.shape)
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise UserError(
            f"scores of query {bad[0]} hold NaN ({len(bad)} such queries); look for NaN in the vectors or the checkpoint"
        )
    if len(bad := np.flatnonzero(~relevance.any(axis=1))):
        raise UserError(
            f"query {bad[0]} has no relevant candidate ({len(bad)} such queries); leave them out or complete the gallery"
        )
    return [_gold(row, grades) for row, grades in zip(scores, relevance, strict=True)]


def _gold(scores: np.ndarray, grades: np.ndarray) -> Gold:
    """Ranks of the relevant, best first: how many others score at least as much, plus the relevant before it.

    Sorting only the relevant makes this O(N log G), where ranking the whole gallery would be O(N log N).
    """
    relevant = grades > 0
    gold, gains = scores[relevant], grades[relevant].astype(np.int64)
    order = np.lexsort((-gains, gold))  # worst first
    not_above = np.searchsorted(gold[order], scores[~relevant], side="right")  # for each other: how many it is ranked before
    others_before = np.bincount(not_above, minlength=len(gold) + 1)[::-1].cumsum()[:-1]  # best first
    return Gold(others_before + np.arange(len(gold)), gains[order[::-1]])


def hit_at(gold: Sequence[Gold], k: int) -> Float[np.ndarray, " Q"]:
    """1 where any relevant candidate is among the first k, else 0. At 1 it is the precision too.

    This is the "R@k" of image-text retrieval (pytrec_eval's success_k), not the share of relevant candidates found.
    """
    return np.array([ranks[0] < k for ranks, _ in gold], np.float64)


def recall_at(gold: Sequence[Gold], k: int) -> Float[np.ndarray, " Q"]:
    """The share of the relevant candidates that are among the first k (pytrec_eval's recall_k)."""
    return np.array([(ranks < k).mean() for ranks, _ in gold])


def ndcg_at(gold: Sequence[Gold], k: int) -> Float[np.ndarray, " Q"]:
    """Discounted gain of the first k over that of the best possible order (pytrec_eval's ndcg_cut_k)."""
    discount = 1 / np.log2(np.arange(k) + 2)
    values = []
    for ranks, gains in gold:
        found, ideal = ranks < k, np.sort(gains)[::-1][:k]
        values.append(gains[found] @ discount[ranks[found]] / (ideal @ discount[: len(ideal)]))
    return np.array(values)


def evaluate(scores: np.ndarray, relevance: np.ndarray | Sequence[Iterable[int]]) -> dict[str, np.ndarray]:
    """Every metric of METRICS, per query: {"R@1": float64 [Q], ...}. Arguments and errors are those of `gold_of`."""
    gold = gold_of(scores, relevance)
    return {"R@1": hit_at(gold, 1), "R@5": hit_at(gold, 5), "R@10": hit_at(gold, 10), "nDCG@10": ndcg_at(gold, 10)}


def bootstrap_mean(values: np.ndarray, seed: int, samples: int = 10_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over the queries and their 95 % percentile intervals, (mean, low, high), each float64 [...].

    values: real [..., Q]. All rows share each resample, so values of one query stay together.
    """
    values = np.asarray(values, np.float64)
    rows_KQ = values.reshape(-1, values.shape[-1])
    queries, random, means = values.shape[-1], np.random.default_rng(seed), []
    block = max(1, 4_000_000 // queries)  # bounds the memory of the draws
    for start in range(0, samples, block):
        size = min(block, samples - start)
        draws = random.integers(queries, size=(size, queries)) + queries * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * queries).reshape(size, queries)
        means.append(counts.astype(np.float64) @ rows_KQ.T / queries)  # drawing again is weighting by how often drawn
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0).reshape(2, *values.shape[:-1])
    return values.mean(axis=-1), low, high


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int, samples: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over the queries and its 95 % percentile interval: (difference, low, high).

    a, b: one metric of the same queries under two systems, real [Q]. Raises UserError when the two do not pair up.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"a paired bootstrap needs two values for each query, but got shapes {a.shape} and {b.shape}")
    difference, low, high = bootstrap_mean(a - b, seed, samples)
    return float(difference), float(low), float(high)
