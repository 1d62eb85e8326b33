"""Time and size of filters: `python benchmarks/filters.py`.

    python benchmarks/filters.py [--items=1000000] [--rounds=5]

Builds an index of items with one small vector each and metadata of three keys, and the same without metadata. Prints the bytes of
the metadata and of their columns, the time of building both indexes, and the time of matching all items with each filter.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import metaembed_jax as me
from metaembed_jax.retrieval.matching import match_items

BLOCK = 10_000  # items that are built at once
WIDTH = 8
WHERES: tuple[dict, ...] = (
    {"page": 3},
    {"page": {"$gte": 10, "$lt": 12}},
    {"lang": "de"},
    {"lang": "de", "page": {"$gte": 10, "$lt": 12}},
    {"path": {"$in": ["/home/me/documents/report 7.pdf", "/home/me/documents/report 9.pdf"]}},
    {"page": {"$ne": 3}},
)


def main() -> None:
    """Build both indexes, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = build(Path(folder) / "without", arguments.items, False)
        with_seconds, index = build(Path(folder) / "with", arguments.items, True)
        print(f"{arguments.items:,} items: built in {with_seconds:.1f} s; without metadata in {seconds:.1f} s")
        for name in ("metadata", "columns"):
            print(f"{name}: {next(index.folder.glob(f'*/{name}')).stat().st_size:,} bytes")
        for where in WHERES:
            times = []
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                matches = int(match_items(index._segments, where).sum())
                times.append(time.perf_counter() - start)
            print(f"{1000 * np.median(times):8.1f} ms  {matches:>11,} match  {json.dumps(where)}")


def build(folder: Path, items: int, has_metadata: bool) -> tuple[float, me.Index]:
    """Return the seconds that an index takes to build, and the index."""
    vectors_NRD = np.zeros((BLOCK, 1, WIDTH), np.float32)
    vectors_NRD[..., 0] = 1

    def blocks() -> Iterator[tuple]:
        for first in range(0, items, BLOCK):
            numbers = range(first, min(first + BLOCK, items))
            fields = [describe(number) if has_metadata else None for number in numbers]
            yield [f"item {number}" for number in numbers], vectors_NRD[: len(numbers)], fields

    start = time.perf_counter()
    index = me.Index.build(blocks(), dtype="int8", path=folder)
    return time.perf_counter() - start, index


def describe(number: int) -> dict:
    """Return the metadata of an item."""
    path = f"/home/me/documents/report {number // 50}.pdf"
    return {"path": path, "page": number % 50 + 1, "lang": "en" if number % 3 else "de"}


if __name__ == "__main__":
    main()
