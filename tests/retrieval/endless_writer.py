"""A process that changes an index without end. Every state of the index is one of `states`."""

import tempfile
from pathlib import Path

import numpy as np

import metaembed_jax as me

SIZES = (40, 55, 70)
WIDTH, VECTORS = 8, 4


def vectors(seed: int, count: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, VECTORS, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def whole(number: int) -> tuple[list[str], np.ndarray]:
    """A new index: its ids and vectors."""
    return [f"{number}-{n}" for n in range(SIZES[number])], vectors(number, SIZES[number])


def states() -> set[tuple[str, ...]]:
    """The ids of every index that may be found."""
    found = set()
    for number in range(len(SIZES)):
        ids, _ = whole(number)
        found |= {tuple(ids), (*ids, "more"), (*ids[1:], "more")}
    return found


def write_forever(folder: Path, is_built) -> None:
    """Sets the event when the index is there."""
    tempfile.tempdir = str(folder.parent)  # a killed process leaves its temporary index
    while True:
        for number in range(len(SIZES)):
            ids, array = whole(number)
            index = me.Index.build(array, ids, path=folder, dtype="float32")
            is_built.set()
            index.add(vectors(9, 1), ["more"])
            index.delete(ids[:1])
            index.compact()
            me.Index.build(array, ids, dtype="float32").save(folder)
