"""Add items to a collection until a kill, and print how many were written after each request: LOCATION WIDTH."""

import sys

from metaembed_jax.retrieval.qdrant import QdrantIndex
from tests.retrieval.test_qdrant import DOCUMENTS, names

index = QdrantIndex.create(sys.argv[1], "icons", int(sys.argv[2]), 64, "model a")
write, written = index.collection.write, 0


def write_and_print(points, vectors, payloads):
    global written
    write(points, vectors, payloads)
    written += len(points)
    print(written, flush=True)


index.collection.write = write_and_print
index.add(names(2000), DOCUMENTS)
