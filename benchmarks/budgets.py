"""Recall and time of an index's types and budgets: `python benchmarks/budgets.py --run=runs/tiny`.

A run encodes all icons as documents, and the names of its test split as queries. The recall of a type is its share of the ten best
of float32; the recall of a budget, or of stages, is its share of the ten best of all vectors in the same index. The survivors of a
first stage are chosen on the names of the validation split. Times are medians, of all queries at once and of one query.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

import metaembed_jax as me
from metaembed_jax.data import sources
from metaembed_jax.data.sources.records import SPLITS
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.stages import as_stages
from metaembed_jax.retrieval.manifest import DTYPES

K = 10
FULL, FIRST = (16, 64), ((1, 1), (2, 4), (4, 8))


def main() -> None:
    """Encode, build an index of each type, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tiny", help="a run of configs/tiny.py (default: runs/tiny)")
    parser.add_argument("--data", default="data", help="config.data.dir of that run (default: data)")
    parser.add_argument("--recall", type=float, default=0.995, help="recall of stages on the validation split (default: 0.995)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each search (default: 5)")
    arguments = parser.parse_args()
    model = me.MetaEmbed.from_pretrained(arguments.run, dtype="float32")
    task = {split: sources.retrieval("icons", arguments.data, split) for split in SPLITS}
    drawings = [item for split in SPLITS for item in task[split].documents]
    document = model.encode_document(drawings, progress=True)
    sample, query = (model.encode_query(task[split].queries, progress=True) for split in SPLITS[1:])

    built = {dtype: me.Index.build(document, dtype=dtype) for dtype in ("float32", *sorted({*DTYPES} - {"float32"}))}
    best = built["float32"].search(query, K, FULL)[1]
    print(f"{len(document):,} icons of {document.shape[1]} x {document.shape[2]}, {len(query):,} queries, top {K}")
    for dtype, index in built.items():
        size = sum(file.stat().st_size for file in index.folder.glob("*/*") if file.name.startswith(("vectors", "scales")))
        vectors = sum(file.stat().st_size for file in index.folder.glob("*/vectors*"))
        recall = share_of(index.search(query, K, FULL)[1], best)
        print(f"  {dtype:9} {recall:7.2%} of float32's, {vectors:11,} bytes of vectors, {size:11,} with scales")

    index = built["bfloat16"]
    best, products = index.search(query, K, FULL)[1], FULL[0] * FULL[1] * len(index)
    budgets = [(1, 1), (2, 4), (4, 8), (8, 16), FULL]
    for first in FIRST:
        survivors = index.survivors(sample, first, FULL, k=K, recall=arguments.recall)
        budgets.append([(*first, survivors), FULL])
    print(f"{'budget':22} {'multiply-adds':>14} {f'recall of top {K}':>16} {'ms a query of all':>18} {'ms of one':>10}")
    for budget in budgets:
        stages = as_stages(budget, *FULL)
        scored = [len(index), *(stage[2] for stage in stages[:-1])]
        share = sum(items * stage[0] * stage[1] for items, stage in zip(scored, stages, strict=True)) / products
        together = median_seconds(lambda budget=budget: index.search(query, K, budget), arguments.rounds) / len(query)
        alone = median_seconds(lambda budget=budget: index.search(query[:1], K, budget), arguments.rounds)
        recall = share_of(index.search(query, K, budget)[1], best)
        print(f"{search_name(stages):22} {share:14.2%} {recall:16.2%} {together * 1e3:18.2f} {alone * 1e3:10.1f}", flush=True)


def share_of(ids_QK: np.ndarray, best_QK: np.ndarray) -> float:
    """Return the share of the best ids that a search returned, in the mean over queries."""
    return float(np.mean([len({*ids} & {*best}) / len(best) for ids, best in zip(ids_QK, best_QK, strict=True)]))


def median_seconds(call: Callable, rounds: int) -> float:
    """Return the median time of a call, after one that compiles."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
