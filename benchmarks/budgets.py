"""Recall and time of an index's types and budgets, and its sure answers: `python benchmarks/budgets.py --run=runs/tiny`.

A run encodes all documents of a source, such as icons, and the queries of its test split, such as their names. The recall of a
type is its share of the ten best of float32; the recall of a budget, or of stages, is its share of the ten best of all vectors
in the same index. A first stage is calibrated on the queries of the validation split. Times are medians, of all queries at once
and of one query.

The ten best of certified searches are compared with those of float64, where scores within 1e-12 are equal. The queries of both
splits are halved at random: survivors are calibrated on a half, and hold if the share of all queries, or of the other half, is
at least the coverage.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from encoded_source import encode_source
from timing import race

import metaembed_jax as me
from metaembed_jax.late_interaction.budgets import budget_name, search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages, scored_documents
from metaembed_jax.retrieval.calibration import choose_rank, count_survivors
from metaembed_jax.retrieval.manifest import DTYPES

K = 10
FULL, FIRST = (16, 64), ((1, 1), (2, 4), (4, 8), (8, 16))
COVERAGE, CONFIDENCE, HALVINGS = 0.99, 0.95, 100
FLOAT64_ITEMS = 1024  # that are scored at once


def main() -> None:
    """Encode, and print two tables and the lines of sure answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tiny", help="a run of configs/tiny.py (default: runs/tiny)")
    parser.add_argument("--data", default="data", help="config.data.dir of that run (default: data)")
    parser.add_argument(
        "--source", default="icons", choices=("icons", "boards"), help="of the documents and queries (default: icons)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="calls of each search (default: 5)")
    parser.add_argument("--certified", type=int, default=1000, help="queries of certified searches (default: 1000)")
    arguments = parser.parse_args()
    document, queries = encode_source(arguments.run, arguments.source, arguments.data)
    sample, query = queries["validation"], queries["test"]
    print(f"{len(document):,} documents of {document.shape[1]} x {document.shape[2]}, {len(query):,} queries, top {K}")
    print_types(document, query)
    print_budgets(document, sample, query, arguments.rounds)
    print_certified(document, query[: arguments.certified])
    print_calibrated(document, np.concatenate([sample, query]))


def print_types(document: np.ndarray, query: np.ndarray) -> None:
    """Print the recall and the bytes of an index of each type."""
    best = None
    for dtype in ("float32", *sorted({*DTYPES} - {"float32"})):
        index = me.Index.build(document, dtype=dtype)
        ids = index.search(query, K).ids
        best = ids if best is None else best
        size = sum(file.stat().st_size for file in index.folder.glob("*/*") if file.name.startswith(("vectors", "scales")))
        vectors = sum(file.stat().st_size for file in index.folder.glob("*/vectors*"))
        print(f"  {dtype:9} {share_of(ids, best):7.2%} of float32's, {vectors:11,} bytes of vectors, {size:11,} with scales")


def print_budgets(document: np.ndarray, sample: np.ndarray, query: np.ndarray, rounds: int) -> None:
    """Print the recall and the time of budgets and of calibrated stages."""
    index = me.Index.build(document, dtype="bfloat16")
    best, products = index.search(query, K, FULL).ids, FULL[0] * FULL[1] * len(index)
    budgets: list = [*FIRST, FULL]
    for first in FIRST[:-1]:
        calibration = index.calibrate(sample, first, FULL, k=K, coverage=COVERAGE, confidence=CONFIDENCE)
        budgets.append([(*first, calibration.survivors), FULL])
    print(f"{'budget':22} {'multiply-adds':>14} {f'recall of top {K}':>16} {'ms a query of all':>18} {'ms of one':>10}")
    for budget in budgets:
        stages = as_stages(budget, Budget(*FULL))
        scored = zip(scored_documents(stages, len(index)), stages, strict=True)
        share = sum(items * stage.budget.query * stage.budget.document for items, stage in scored) / products
        together = median_seconds(lambda budget=budget: index.search(query, K, budget), rounds) / len(query)
        alone = median_seconds(lambda budget=budget: index.search(query[:1], K, budget), rounds)
        recall = share_of(index.search(query, K, budget).ids, best)
        print(f"{search_name(stages):22} {share:14.2%} {recall:16.2%} {together * 1e3:18.2f} {alone * 1e3:10.1f}", flush=True)


def print_certified(document: np.ndarray, query: np.ndarray) -> None:
    """Print how many certified answers of an index of int8 equal float64's, and how many items were scored again."""
    index = me.Index.build(document, dtype="int8", exact="float32")
    start = time.perf_counter()
    hits = index.search(query, K, certified=True)
    seconds = time.perf_counter() - start
    best = [[str(row) for row in best_of(query_RD, document)] for query_RD in query]
    equal = [ids.tolist() == rows for ids, rows in zip(hits.ids, best, strict=True)]
    rows = np.flatnonzero(hits.certified)
    print(
        f"certified: {len(rows):,} of {len(query):,} queries; the {K} best of {sum(equal[row] for row in rows):,} of them equal "
        f"float64's; items scored again: mean {hits.rescored.mean():.1f}, largest {hits.rescored.max():,}; "
        f"{seconds / len(query) * 1e3:.2f} ms a query"
    )


def print_calibrated(document: np.ndarray, query: np.ndarray) -> None:
    """Print in how many halvings of the queries the survivors of one half hold."""
    index, rng = me.Index.build(document, dtype="float32"), np.random.default_rng(0)
    half = len(query) // 2
    rank = choose_rank(half, COVERAGE, CONFIDENCE)
    for first in FIRST:
        needed_Q = count_survivors(index._searcher, query, (Budget(*first), Budget(*FULL)), K, len(query), len(index))
        survivors, holds_of_all, holds_of_others = [], 0, 0
        for _ in range(HALVINGS):
            order = rng.permutation(len(query))
            survivors.append(np.sort(needed_Q[order[:half]])[rank - 1])
            holds_of_all += (needed_Q <= survivors[-1]).mean() >= COVERAGE
            holds_of_others += (needed_Q[order[half:]] <= survivors[-1]).mean() >= COVERAGE
        print(
            f"calibrated {budget_name(first)}: {int(np.median(survivors)):,} survivors on {half:,} queries (median); they hold "
            f"{COVERAGE:.0%} of all {len(query):,} queries in {holds_of_all} of {HALVINGS} halvings, and of the other half in "
            f"{holds_of_others}"
        )


def best_of(query_RD: np.ndarray, document_NRD: np.ndarray) -> list[int]:
    """Return the rows of the ten best documents by float64."""
    blocks = np.split(document_NRD, range(FLOAT64_ITEMS, len(document_NRD), FLOAT64_ITEMS))
    scores_N = np.concatenate([(block.astype(float) @ query_RD.astype(float).T).max(1).sum(1) for block in blocks])
    return np.argsort(-np.round(scores_N, 12), kind="stable")[:K].tolist()


def share_of(ids_QK: np.ndarray, best_QK: np.ndarray) -> float:
    """Return the share of the best ids that a search returned, in the mean over queries."""
    return float(np.mean([len({*ids} & {*best}) / len(best) for ids, best in zip(ids_QK, best_QK, strict=True)]))


def median_seconds(call: Callable, rounds: int) -> float:
    """Return the median time of a call, after one that compiles."""
    call()
    return race({"search": call}, rounds)["search"]


if __name__ == "__main__":
    main()
