"""What budgets and types keep of a trained index, and what they cost: `python benchmarks/budgets.py --run=runs/tiny`.

Encodes all icons with a run, and the names of its test split as queries. The measure is what a full search finds: how much of the
ten best of float32 vectors does an index of another type find, and how much of its own ten best does a search by fewer vectors or
in stages? How many items must survive a first stage is chosen on the names of the validation split. Times are medians of turns, of
all queries at once and of one.
"""

import argparse
import statistics
import time

import numpy as np

import metaembed_jax as me
from metaembed_jax.data import sources
from metaembed_jax.data.sources.records import SPLITS
from metaembed_jax.late_interaction.stages import as_stages
from metaembed_jax.retrieval.manifest import DTYPES

K = 10
FULL, FIRST = (16, 64), ((1, 1), (2, 4), (4, 8))


def main() -> None:
    """Encodes, builds an index of each type, and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tiny", help="a run of configs/tiny.py (default: runs/tiny)")
    parser.add_argument("--data", default="data", help="config.data.dir of that run (default: data)")
    parser.add_argument("--recall", type=float, default=0.995, help="of the sample, by which survivors are chosen (default: 0.995)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each search (default: 5)")
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
        found = index.search(query, K, FULL)[1]
        print(f"  {dtype:9} {kept(found, best):7.2%} of float32's, {vectors:11,} bytes of vectors, {size:11,} with scales")

    index = built["bfloat16"]
    best, whole = index.search(query, K, FULL)[1], FULL[0] * FULL[1]
    budgets = [(1, 1), (2, 4), (4, 8), (8, 16), FULL]
    for first in FIRST:
        survivors = index.survivors(sample, first, FULL, k=K, recall=arguments.recall)
        budgets.append([(*first, survivors), FULL])
    print(f"{'budget':22} {'multiply-adds':>14} {f'kept of top {K}':>15} {'ms a query of all':>18} {'ms of one':>10}")
    for budget in budgets:
        stages = as_stages(budget, *FULL)
        scored = [len(index), *(stage[2] for stage in stages[:-1])]
        share = sum(items * stage[0] * stage[1] for items, stage in zip(scored, stages, strict=True)) / (whole * len(index))
        together = median_seconds(lambda budget=budget: index.search(query, K, budget), arguments.rounds) / len(query)
        alone = median_seconds(lambda budget=budget: index.search(query[:1], K, budget), arguments.rounds)
        name = ">".join(":".join(map(str, stage)) for stage in stages)
        found = index.search(query, K, budget)[1]
        print(f"{name:22} {share:14.2%} {kept(found, best):15.2%} {together * 1e3:18.2f} {alone * 1e3:10.1f}", flush=True)


def kept(found: np.ndarray, best: np.ndarray) -> float:
    """The share of the best that is among what was found."""
    return float(np.mean([len({*mine} & {*wanted}) / len(wanted) for mine, wanted in zip(found, best, strict=True)]))


def median_seconds(call, rounds: int) -> float:
    """Of so many calls, after one that compiles."""
    call()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
