"""Sizes of the items of training sources, before anything is read or drawn: what rows are planned from.

A prepared source has a table of all its sizes, which a file beside its records keeps for each tokenizer and processing of images.
A source that draws its records is asked for a description of each.

R rows, K negatives of a pair; an item's size is (tokens, patches, cut, shrunk), as in `Fitted`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from metaembed_jax.data.sources.described import describe_row
from metaembed_jax.data.sources.records import Records
from metaembed_jax.data.workers import map_with, workers_for
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, replacing

TOKENS, PATCHES, CUT, SHRUNK = range(4)  # the last axis of sizes
LOCK = "sizes.lock"
BLOCK = 1024  # rows that a process sizes at once
REMEMBERED = 1 << 17  # items whose sizes are kept, for texts and shapes that come again
# Items whose sizes name a processor: another version of its code, that sizes them otherwise, must not read its tables.
PROBES = [{"text": "a"}, {"text": "a b " * 3000}, {"text": "a", "image": (7, 7)}]
PROBES += [{"image": shape} for shape in ((1, 150), (640, 480), (1000, 1400), (84, 63), (3000, 250), (8000, 8000))]


class SourceSizes:
    """The sizes of the items of one source. Survives pickling.

    Args:
      source: of training pairs.
      processor: the family's, with its limits.
      negatives: K, the most that are used of a pair.
      name: of the source, for errors.

    Attributes:
      table: of all rows, where they are the same in every epoch and step; else None.
    """

    def __init__(self, source: Sequence, processor: object, negatives: int, name: str):
        self._source, self._name = source, name
        self._sizer = _Sizer(processor, negatives)
        stored = getattr(source, "stored", None)
        self.table: Int[np.ndarray, "R I 4"] | None = None if stored is None else _table(stored, self._sizer, name)

    def of(self, row: int, epoch: int, step: int) -> Int[np.ndarray, "I 4"]:
        """The sizes of a row's query, positive and negatives; 0 in place of negatives that it lacks.

        Raises:
          UserError: an item that no row takes.
        """
        if self.table is not None:
            return self.table[row]
        return self._sizer(describe_row(self._source, row, epoch, step, self._name), f"source {self._name!r}, row {row}")


class _Sizer:
    """Descriptions to sizes, remembering those of items."""

    def __init__(self, processor: object, negatives: int):
        self.processor, self.negatives = processor, negatives
        self._remembered = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_remembered": {}}

    def __call__(self, description: dict, name: str) -> Int[np.ndarray, "I 4"]:
        sizes = np.zeros((2 + self.negatives, 4), np.int32)
        sizes[0] = self.size(description["query"], "query", f"{name}, query")
        sizes[1] = self.size(description["positive"], "document", f"{name}, positive")
        for number, item in enumerate(description["negatives"][: self.negatives]):
            sizes[2 + number] = self.size(item, "document", f"{name}, negative {number}")
        return sizes

    def size(self, item: dict, side: str, name: str) -> tuple[int, int, int, bool]:
        key = side, item.get("text"), item.get("image")
        if key not in self._remembered:
            if len(self._remembered) >= REMEMBERED:
                self._remembered = {}
            self._remembered[key] = self.processor.size(item, side, name=name)
        return self._remembered[key]

    def digits(self, source: str) -> str:
        """Change with the fingerprint of the source, and with all that sizes depend on, the code of the processor included."""
        probes = [self._probe(item, side) for item in PROBES for side in ("query", "document")]
        return digest(json.dumps([source, self.processor.fingerprint, self.negatives, probes]).encode())

    def _probe(self, item: dict, side: str) -> Sequence[int] | str:
        try:
            return self.processor.size(item, side, name="probe")
        except UserError as error:
            return str(error)


def _table(stored: Records, sizer: _Sizer, name: str) -> Int[np.ndarray, "R I 4"]:
    """The table of a prepared source: read, or computed and written by the first process that comes."""
    file = stored.folder / f"sizes-{stored.split}-{sizer.digits(stored.about['fingerprint'])}.npy"
    shape = (len(stored), 2 + sizer.negatives, 4)
    if (table := _read_table(file, shape)) is not None:
        return table
    if not os.access(stored.folder, os.W_OK):
        print(f"{stored.folder} cannot be written: the sizes of its items are computed again each time", flush=True)
        return _compute(_Job(stored, sizer, name))
    with locked(stored.folder / LOCK, f"another process computes the sizes of items in {stored.folder}; waiting for it", wait=True):
        if (table := _read_table(file, shape)) is None:
            table = _compute(_Job(stored, sizer, name))
            with replacing(file) as target:
                np.save(target, table)
        return table


def _read_table(file: Path, shape: tuple[int, int, int]) -> Int[np.ndarray, "R I 4"] | None:
    """The table of a file, or None where it is missing or damaged."""
    try:
        with file.open("rb") as stored:
            table = np.lib.format.read_array(stored)
    except (OSError, ValueError):  # ValueError: a damaged header, or too few bytes
        return None
    if table.shape != shape or table.dtype != np.int32:
        return None
    has_pairs = (table[:, :2, TOKENS] > 0).all()  # a query and its positive have tokens; zeros are what a lost page of a disk has
    return table if has_pairs and (table >= 0).all() else None


class _Job(NamedTuple):
    stored: Records
    sizer: _Sizer
    name: str


def _compute(job: _Job) -> Int[np.ndarray, "R I 4"]:
    rows = len(job.stored)
    blocks = [range(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK)]
    sizes = []
    with tqdm(total=rows, desc=f"{job.name}: sizes of items", unit="row", mininterval=0.5, delay=1) as bar:
        for block in map_with(job, _sizes_of, blocks, workers_for(rows)):
            sizes.append(block)
            bar.update(len(block))
    return np.concatenate(sizes)


def _sizes_of(job: _Job, rows: range) -> Int[np.ndarray, "r I 4"]:
    return np.stack([job.sizer(job.stored.described(row), f"source {job.name!r}, row {row}") for row in rows])
