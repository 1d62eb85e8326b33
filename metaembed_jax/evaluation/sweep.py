"""Every budget of one encoding, both directions: encode once at the largest budget, then slice."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.budgets import by_cost
from metaembed_jax.evaluation.cost import index_bytes, maxsim_flops
from metaembed_jax.evaluation.metrics import METRICS, bootstrap_mean, evaluate, relevance_matrix
from metaembed_jax.evaluation.worst import Ranking, worst_queries
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.maxsim import maxsim


def check_budgets(budgets: Sequence[Budget], largest: Budget | None = None) -> None:
    """Raises UserError where there is no budget, one is given twice, holds no vector, or is beyond `largest`."""
    if not budgets:
        raise UserError("no budget given; write for example 1:1,4:8,16:64")
    for n, (r_q, r_c) in enumerate(budgets):
        if (r_q, r_c) in budgets[:n]:
            raise UserError(f"budget {r_q}:{r_c} is given twice; leave one out")
        if r_q < 1 or r_c < 1:
            raise UserError(f"budget {r_q}:{r_c} holds no vector on one side; both numbers must be at least 1")
        if largest and (r_q > largest[0] or r_c > largest[1]):
            raise UserError(
                f"budget {r_q}:{r_c} is beyond the model's {largest[0]} query and {largest[1]} candidate vectors; ask for fewer"
            )


def sweep(
    query_QRD: np.ndarray,
    candidate_NRD: np.ndarray,
    relevance: np.ndarray | Sequence[Iterable[int]],
    budgets: Sequence[Budget],
    directions: tuple[str, str] = ("query→candidate", "candidate→query"),
    seed: int = 0,
    score: Callable = maxsim,
    candidates: int | None = None,
) -> dict:
    """All metrics at all budgets in both directions, with 95 % bootstrap intervals, ready for JSON.

    query_QRD, candidate_NRD: the nested vectors at the largest budget, real [Q, R_q, D] and [N, R_c, D].
    score: (query_QRD, candidate_NRD, budget) -> [Q, N]. candidates: N, where candidate_NRD is only this host's part of them.
    relevance: bool or grades [Q, N], or a set of candidates for each query. directions: the names of forward and backward.

    Backward, the same scores are read the other way: a candidate looks for its queries. What is searched then holds r_q
    vectors each, and candidates that no query names have nothing to find and are left out (forward, that is an error).

    Returns {"dimension": D, "directions": [{"name", "queries", "candidates", "rows": [...], "gain": {...} or None}, ...],
    "worst": [...]} with a row {"budget": [r_q, r_c], "flops_per_candidate", "bytes_per_candidate", "metrics": {name: interval}}
    for each budget, cheapest first, an interval {"mean", "low", "high"} as fractions of 1, in "gain" {"from", "to", "metrics"}
    the paired difference between the cheapest and the dearest budget (None for a single budget), and in "worst" what
    `worst.worst_queries` finds forward at the dearest budget, each a `worst.Miss` as a dict.

    Raises UserError for vectors that do not fit together, for budgets as `check_budgets`, and as `metrics.gold_of`.
    """
    shapes = tuple(query_QRD.shape), tuple(candidate_NRD.shape)
    if len(shapes[0]) != 3 or len(shapes[1]) != 3 or shapes[0][2] != shapes[1][2]:
        raise UserError(f"query vectors {shapes[0]} and candidate vectors {shapes[1]} must be [items, vectors, D] of one D")
    (queries, r_q, dimension), (held, r_c, _) = shapes
    candidates = held if candidates is None else candidates
    budgets = by_cost(budgets)
    check_budgets(budgets, (r_q, r_c))
    relevant = relevance_matrix(relevance, (queries, candidates))
    named = relevant.any(axis=0)

    forward, backward = [], []
    for budget in budgets:
        scores = np.asarray(score(query_QRD, candidate_NRD, budget))
        forward.append(evaluate(scores, relevant))
        backward.append(evaluate(scores.T[named], relevant.T[named]))
    everything = np.arange(candidates)
    worst = worst_queries(Ranking(everything, *row) for row in zip(scores, relevant > 0, strict=True))  # the last, dearest budget's
    return {
        "dimension": dimension,
        "directions": [
            _direction(directions[0], candidates, budgets, [r_c for _, r_c in budgets], forward, dimension, seed),
            _direction(directions[1], queries, budgets, [r_q for r_q, _ in budgets], backward, dimension, seed),
        ],
        "worst": [miss._asdict() for miss in worst],
    }


def _direction(
    name: str,
    candidates: int,
    budgets: Sequence[Budget],
    vectors: Sequence[int],
    per_query: Sequence[dict[str, np.ndarray]],
    dimension: int,
    seed: int,
) -> dict:
    """One direction's part of the results; vectors: how many each searched item holds at each budget."""
    values_BMQ = np.array([[values[metric] for metric in METRICS] for values in per_query])
    intervals = _intervals(values_BMQ, seed)
    rows = [
        {
            "budget": list(budget),
            "flops_per_candidate": maxsim_flops(budget, dimension),
            "bytes_per_candidate": index_bytes(held, dimension),
            "metrics": interval,
        }
        for budget, held, interval in zip(budgets, vectors, intervals, strict=True)
    ]
    gain = None
    if len(budgets) > 1:
        difference = _intervals(values_BMQ[-1:] - values_BMQ[:1], seed)[0]
        gain = {"from": list(budgets[0]), "to": list(budgets[-1]), "metrics": difference}
    return {"name": name, "queries": values_BMQ.shape[2], "candidates": candidates, "rows": rows, "gain": gain}


def _intervals(values_BMQ: np.ndarray, seed: int) -> list[dict[str, dict[str, float]]]:
    """For each budget {metric: {"mean", "low", "high"}} of the per-query values."""
    mean_low_high = np.stack(bootstrap_mean(values_BMQ, seed), axis=-1).tolist()
    return [
        {metric: dict(zip(("mean", "low", "high"), three, strict=True)) for metric, three in zip(METRICS, row, strict=True)}
        for row in mean_low_high
    ]
