"""Calibration on a sample of queries: enough survivors of a first stage that most queries lose none of their k best items.

A query needs as many survivors as the largest rank, in the first stage, of its k best items. The m-th smallest of these numbers
over a sample of n queries is enough for a share of at least p of all queries, with a probability of at least BinomialCDF(m - 1;
n, p). The least m for which this is the confidence is used. No distribution is assumed, only that the queries are drawn
independently from those to expect.

Q queries, R vectors of a query, D width of a vector, K items of a search, k results.
"""

import math
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stage, Stages
from metaembed_jax.retrieval.manifest import Calibration

if TYPE_CHECKING:
    from metaembed_jax.retrieval.search import Searcher

FIRST_DEPTH, DEPTH_FACTOR = 1024, 4  # items of the first search for ranks, and how many times more each next one has
RANKED_ITEMS = 2**22  # of all queries, in memory at once


def choose_rank(queries: int, coverage: float, confidence: float) -> int:
    """Return the least m such that the m-th smallest of a sample is enough for the coverage, with the confidence.

    Raises:
      UserError: coverage or confidence is not between 0 and 1, or the sample is too small for them.
    """
    for name, share in (("coverage", coverage), ("confidence", confidence)):
        if not isinstance(share, Real) or not 0 < share < 1:
            raise UserError(f"{name}={share!r}: expected a share between 0 and 1, such as 0.99")
    probability = 0.0
    for successes in range(queries):  # of the sample within the share
        log_ways = math.lgamma(queries + 1) - math.lgamma(successes + 1) - math.lgamma(queries - successes + 1)
        probability += math.exp(log_ways + successes * math.log(coverage) + (queries - successes) * math.log1p(-coverage))
        if probability >= confidence:
            return successes + 1
    needed = math.ceil(math.log1p(-confidence) / math.log(coverage))
    raise UserError(
        f"{queries} queries: expected at least {needed} for coverage={coverage:g} with confidence={confidence:g}; "
        "give more queries, or lower one of the two"
    )


def calibrate(
    searcher: "Searcher",
    query_QRD: Float[np.ndarray, "Q R D"],
    budgets: tuple[Budget, Budget],
    k: int,
    shares: tuple[float, float],
    items: int,
) -> Calibration:
    """Choose the number of survivors of a first stage.

    Args:
      budgets: of the first and of the second stage.
      shares: coverage and confidence.
      items: number of items that are searched, at least k.

    Raises:
      UserError: as `choose_rank`.
    """
    rank = choose_rank(len(query_QRD), *shares)
    survivors_Q = count_survivors(searcher, query_QRD, budgets, k, rank, items)
    coverage, confidence = map(float, shares)
    return Calibration(*budgets, k, coverage, confidence, int(np.sort(survivors_Q)[rank - 1]), len(query_QRD), items)


def count_survivors(
    searcher: "Searcher",
    query_QRD: Float[np.ndarray, "Q R D"],
    budgets: tuple[Budget, Budget],
    k: int,
    enough: int,
    items: int,
) -> Int[np.ndarray, " Q"]:
    """Return the fewest survivors of the first stage that hold the k best items of the second stage, for each query.

    Items are ranked by searches of growing depth, as the first stage of a search ranks them. Once the survivors of enough
    queries are known, those of the others, which need more, are given as `items` + 1.

    Args:
      budgets: of the first and of the second stage.
      k: at most `items`.
      enough: number of queries whose survivors are needed, the fewest first.
      items: number of items that are searched.
    """
    first, last = budgets
    _, best_Qk = searcher.search(query_QRD, k, (Stage(last),))
    survivors_Q, depth = np.full(len(query_QRD), items + 1), max(FIRST_DEPTH, DEPTH_FACTOR * k)
    while True:
        depth = min(depth, items)
        pending, at_once = np.flatnonzero(survivors_Q > items), max(RANKED_ITEMS // depth, 1)
        for start in range(0, len(pending), at_once):
            numbers = pending[start : start + at_once]
            _, ranked_QK = searcher.search(query_QRD[numbers], depth, (Stage(first),))
            for number, ranked_K in zip(numbers.tolist(), ranked_QK, strict=True):
                columns = np.flatnonzero(np.isin(ranked_K, best_Qk[number]))
                if len(columns) == k:
                    survivors_Q[number] = columns[-1] + 1
        if (survivors_Q <= items).sum() >= enough:
            return survivors_Q
        depth *= DEPTH_FACTOR


def calibrated_stages(calibrations: Iterable[Calibration], k: int, items: int, width: int) -> Stages:
    """Return the calibrated stages for k results: those of the largest last budget, and of these the cheapest.

    A calibration for more results serves too. If the index has more items now, the survivors are increased in proportion.

    Args:
      width: numbers of a vector.

    Raises:
      UserError: k is not a positive integer, or the index was not calibrated, or for fewer results.
    """
    if not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k={k!r}: expected a positive integer")
    calibrations = list(calibrations)
    if not calibrations:
        raise UserError("budget='auto': this index is not calibrated; call `index.calibrate`, or run `metaembed calibrate`")
    enough = [calibration for calibration in calibrations if calibration.k >= k]
    if not enough:
        most = max(calibration.k for calibration in calibrations)
        raise UserError(f"budget='auto' with k={k}: expected at most {most}, the k of the calibration; calibrate again with k={k}")

    def survivors(calibration: Calibration) -> int:
        return min(math.ceil(calibration.survivors * max(items / calibration.items, 1)), items)

    def cost(calibration: Calibration) -> tuple[int, int]:
        first, last = (budget.query * budget.document * budget.numbers(width) for budget in (calibration.first, calibration.last))
        return -last, items * first + survivors(calibration) * last

    cheapest = min(enough, key=cost)
    return Stage(cheapest.first, survivors(cheapest)), Stage(cheapest.last)


def with_calibration(calibrations: Iterable[Calibration], new: Calibration) -> tuple[Calibration, ...]:
    """Return calibrations with a new one, in place of the one of the same budgets and k."""
    key = new.first, new.last, new.k
    return *(old for old in calibrations if (old.first, old.last, old.k) != key), new


def describe(calibration: Calibration) -> str:
    """Format a calibration as a line."""
    stages = search_name((Stage(calibration.first, calibration.survivors), Stage(calibration.last)))
    return (
        f"{stages}: {calibration.survivors:,} of {calibration.items:,} items survive the first stage; at least "
        f"{calibration.coverage:.2%} of queries lose none of their {calibration.k} best (confidence {calibration.confidence:.2%}, "
        f"{calibration.queries:,} queries)"
    )
