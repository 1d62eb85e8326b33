"""A process that changes an index forever. Every state of the index is in `states`."""

import tempfile
from pathlib import Path

import numpy as np

import metaembed_jax as me

SIZES = (40, 55, 70)
WIDTH, VECTORS = 8, 4


def vectors(seed: int, count: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, VECTORS, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def new_index(number: int) -> tuple[list[str], np.ndarray]:
    """Return the ids and vectors of a new index."""
    return [f"{number}-{n}" for n in range(SIZES[number])], vectors(number, SIZES[number])


def states() -> set[tuple[str, ...]]:
    """Return the ids of every state of the index."""
    states = set()
    for number in range(len(SIZES)):
        ids, _ = new_index(number)
        states |= {tuple(ids), (*ids, "more"), (*ids[1:], "more")}
    return states


def write_forever(folder: Path, is_built) -> None:
    """Build and change an index again and again; set the event when it exists."""
    tempfile.tempdir = str(folder.parent)  # a killed process does not remove its temporary index
    while True:
        for number in range(len(SIZES)):
            ids, array = new_index(number)
            index = me.Index.build(array, ids, path=folder, dtype="float32")
            is_built.set()
            index.add(vectors(9, 1), ["more"])
            index.delete(ids[:1])
            index.compact()
            me.Index.build(array, ids, dtype="float32").save(folder)
