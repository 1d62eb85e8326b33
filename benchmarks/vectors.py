"""Compare runs on the same queries, at every budget: `python benchmarks/vectors.py runs/boards runs/boards_symmetric`.

Every run encodes the documents and the queries of a split. For each budget the table has R@1 and R@10 of the first run, and the
differences of the others from it, in points, with 95 % intervals from bootstrap samples of the queries, which all runs share.
Settings are chosen on the validation split, which is the default; --split=test is for those that were chosen.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import metaembed_jax as me
from metaembed_jax.data import sources
from metaembed_jax.data.sources.records import Retrieval
from metaembed_jax.evaluation.metrics import bootstrap_mean, evaluate, relevance_matrix
from metaembed_jax.late_interaction.budgets import budget_name, parse_name

SHOWN = ("R@1", "R@10")
DIRECTIONS = "queries search documents", "documents search queries"


class Values(NamedTuple):
    """A metric of each query, in both directions: float64 [B, Q] at each of B budgets."""

    forward: dict[str, np.ndarray]
    backward: dict[str, np.ndarray]


def main() -> None:
    """Encode and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs; the others are compared with the first")
    parser.add_argument("--source", default="boards", help="a prepared source (default: boards)")
    parser.add_argument("--split", default="validation", choices=("validation", "test"), help="(default: validation)")
    parser.add_argument("--data", default="data", help="config.data.dir of the runs (default: data)")
    parser.add_argument("--budgets", default="1:1,2:4,4:8,8:16,16:64", help="such as 16:64x32 (default: 1:1,2:4,4:8,8:16,16:64)")
    arguments = parser.parse_args()
    budgets = [budget for name in arguments.budgets.split(",") for budget in parse_name(name)]
    task = sources.retrieval(arguments.source, arguments.data, arguments.split)
    print(f"{arguments.source}, {arguments.split}: {len(task.queries):,} queries, {len(task.documents):,} documents")
    values = {run: measure(run, task, budgets) for run in arguments.runs}
    first, *others = arguments.runs
    for direction in Values._fields:
        print(f"\n{dict(zip(Values._fields, DIRECTIONS, strict=True))[direction]}")
        print(f"  {'':40} " + " ".join(f"{name:>27}" for name in map(budget_name, budgets)))
        base = getattr(values[first], direction)
        for metric in SHOWN:
            print(f"  {f'{metric}, {first}':40} " + " ".join(f"{100 * mean:27.1f}" for mean in base[metric].mean(1)))
            for run in others:
                difference_B3 = np.stack(bootstrap_mean(getattr(values[run], direction)[metric] - base[metric], 0), axis=-1)
                cells = (f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, low, high in 100 * difference_B3)
                print(f"  {f'{metric}, {run}':40} " + " ".join(f"{cell:>27}" for cell in cells), flush=True)


def measure(run: str, task: Retrieval, budgets: Sequence[tuple[int, ...]]) -> Values:
    """Encode a task with a run, and return the metrics of all queries and of all documents that have a query."""
    model = me.MetaEmbed.from_pretrained(run, dtype="float32")
    document = model.encode_document(task.documents, progress=True)
    query = model.encode_query(task.queries, progress=True)
    relevant_QN = relevance_matrix(task.relevance, (len(query), len(document)))
    has_query_N = relevant_QN.any(axis=0)
    forward, backward = [], []
    for budget in budgets:
        scores_QN = model.similarity(query, document, budget)
        forward.append(evaluate(scores_QN, relevant_QN))
        backward.append(evaluate(scores_QN.T[has_query_N], relevant_QN.T[has_query_N]))
    return Values(*({name: np.array([values[name] for values in side]) for name in SHOWN} for side in (forward, backward)))


if __name__ == "__main__":
    main()
