"""Metrics at every budget, in both directions, from one encoding at the largest budget: smaller budgets are prefixes of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.evaluation.failures import Ranking, worst_queries
from metaembed_jax.evaluation.metrics import METRICS, bootstrap_mean, evaluate, relevance_matrix
from metaembed_jax.late_interaction.budgets import budget_name, by_cost
from metaembed_jax.late_interaction.groups import Budget, validate_budget
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.results import Gain, Interval, SearchResults, TaskResults

MAIN, SECONDARY = "R@10", "R@1"


class Sweep(NamedTuple):
    """Both directions of a search task.

    Attributes:
      forward: queries search documents; has the worst queries at the largest budget.
      backward: documents search queries, by the same scores; each searched item has r_q vectors. Documents that are relevant to no
        query are left out (forward, a query without a relevant document is an error).
    """

    forward: TaskResults
    backward: TaskResults


def sweep(
    name: str,
    query_QRD: Float[np.ndarray, "Q Rq D"],
    document_NRD: Float[np.ndarray, "N Rc D"],
    relevance: np.ndarray | Sequence[Iterable[int]],
    budgets: Iterable[Sequence[int]],
    *,
    data: str = "",
    documents: int | None = None,
    score: Callable = maxsim,
    used: Callable[[Budget], tuple[float, float]] | None = None,
    seed: int = 0,
) -> Sweep:
    """Compute all metrics at all budgets in both directions, with 95 % bootstrap intervals.

    Args:
      name, data: name and data of the results.
      query_QRD, document_NRD: the nested vectors at the largest budget.
      relevance: as in `relevance_matrix`.
      documents: N, if document_NRD is only this host's share.
      score: `(query_QRD, document_NRD, budget) -> [Q, N]`.
      used: `(budget) -> (query vectors, document vectors)`, the mean numbers for costs; those of the budget by default.

    Raises:
      UserError: vectors of different widths, a budget beyond them, or as `metrics.gold_of`.
    """
    (queries, query_vectors, _), (held, document_vectors, dimension) = _shapes(query_QRD, document_NRD)
    total = held if documents is None else documents
    largest = Budget(query_vectors, document_vectors, dimension)
    budgets = by_cost((validate_budget(budget, largest) for budget in budgets), dimension)
    relevant_QN = relevance_matrix(relevance, (queries, total))
    has_query_N = relevant_QN.any(axis=0)

    forward, backward, scores_QN = [], [], np.zeros((queries, total))
    for budget in budgets:
        scores_QN = np.asarray(score(query_QRD, document_NRD, budget))
        forward.append(evaluate(scores_QN, relevant_QN))
        backward.append(evaluate(scores_QN.T[has_query_N], relevant_QN.T[has_query_N]))
    counts = [None if used is None else used(budget) for budget in budgets]
    numbers_N = np.arange(total)
    rankings = (Ranking(numbers_N, *row) for row in zip(scores_QN, relevant_QN > 0, strict=True))  # at the last, largest budget

    def direction(values: Sequence[Mapping[str, np.ndarray]], queries: int, documents: int, side: int) -> TaskResults:
        searches, gain = _metrics_at(budgets, counts, values, dimension, side, seed)
        return TaskResults(
            name=name,
            metric=MAIN,
            queries=queries,
            documents=documents,
            dimension=dimension,
            data=data,
            searches=searches,
            gain=gain,
        )

    return Sweep(
        replace(direction(forward, queries, total, side=1), failures=worst_queries(rankings, (name,))),
        direction(backward, int(has_query_N.sum()), queries, side=0),
    )


def _shapes(query_QRD: np.ndarray, document_NRD: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of both.

    Raises:
      UserError: they are not [items, vectors, D] of one D.
    """
    shapes = tuple(query_QRD.shape), tuple(document_NRD.shape)
    if len(shapes[0]) != 3 or len(shapes[1]) != 3 or shapes[0][2] != shapes[1][2]:
        raise UserError(f"query vectors {shapes[0]} and document vectors {shapes[1]}: expected [items, vectors, D] of one D")
    return shapes


def _metrics_at(
    budgets: Sequence[Budget],
    counts: Sequence[tuple[float, float] | None],
    values: Sequence[Mapping[str, np.ndarray]],
    dimension: int,
    side: int,
    seed: int,
) -> tuple[tuple[SearchResults, ...], Gain | None]:
    """Return the results of each budget, and the gain of the last budget over the first.

    Args:
      counts: for each budget, the vectors of a query and of a document, if they are not those of the budget.
      values: for each budget, every metric per query.
      side: index of the searched items in a budget.
    """
    values_BMQ = np.array([[metrics[name] for name in METRICS] for metrics in values])
    searches = tuple(
        SearchResults(
            budget=budget_name(budget),
            flops_per_document=maxsim_flops(budget, dimension, count),
            bytes_per_document=index_bytes(budget, dimension, side, count),
            metrics=metrics,
        )
        for budget, count, metrics in zip(budgets, counts, _intervals(values_BMQ, seed), strict=True)
    )
    if len(budgets) == 1:
        return searches, None
    difference = _intervals(values_BMQ[-1:] - values_BMQ[:1], seed)[0]
    return searches, Gain(smallest=searches[0].budget, largest=searches[-1].budget, metrics=difference)


def _intervals(values_BMQ: Float[np.ndarray, "B M Q"], seed: int) -> list[dict[str, Interval]]:
    """Return the interval of each metric, for each budget."""
    ends_BM3 = np.stack(bootstrap_mean(values_BMQ, seed), axis=-1).tolist()
    return [{name: Interval(*ends) for name, ends in zip(METRICS, ends_M3, strict=True)} for ends_M3 in ends_BM3]
