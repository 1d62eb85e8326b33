"""Sizes of the items of training sources, to plan rows before any record is read.

A prepared source has a table of all its sizes, in a file next to its records for each tokenizer and processing of images. A source
that composes its records has no table; its sizes come from descriptions.

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

from metaembed_jax.batch.items import Fitted
from metaembed_jax.data.sources.descriptions import describe_row
from metaembed_jax.data.sources.records import Records
from metaembed_jax.data.workers import map_with, workers_for
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, replacing
from metaembed_jax.inputs.processors import PromptProcessor

TOKENS, PATCHES, CUT, SHRUNK = range(4)  # the last axis of sizes
LOCK = "sizes.lock"
CHUNK_ROWS = 1024  # rows that a process sizes at once
CACHED = 1 << 17  # items whose sizes are kept, for texts and shapes that repeat
# The sizes of these items are in the names of tables: another version of the processor's code must not read them.
PROBES = [{"text": "a"}, {"text": "a b " * 3000}, {"text": "a", "image": (7, 7)}]
PROBES += [{"image": shape} for shape in ((1, 150), (640, 480), (1000, 1400), (84, 63), (3000, 250), (8000, 8000))]


class SourceSizes:
    """The sizes of the items of a source. Can be pickled.

    Args:
      source: source of training pairs.
      processor: the family's, with its limits.
      negatives: K, the most that are used of a pair.
      name: name of the source, for errors.

    Attributes:
      table: sizes of all rows; None if they depend on epoch or step.
    """

    def __init__(self, source: Sequence, processor: PromptProcessor, negatives: int, name: str):
        self._source, self._name = source, name
        self._sizer = _Sizer(processor, negatives)
        stored = getattr(source, "stored", None)
        self.table: Int[np.ndarray, "R I 4"] | None = None if stored is None else _table(stored, self._sizer, name)

    def of(self, row: int, epoch: int, step: int) -> Int[np.ndarray, "I 4"]:
        """Return the sizes of a row's query, positive and negatives; 0 for missing negatives.

        Raises:
          UserError: an item does not fit a row.
        """
        if self.table is not None:
            return self.table[row]
        return self._sizer(describe_row(self._source, row, epoch, step, self._name), f"source {self._name!r}, row {row}")


class _Sizer:
    """Turns descriptions into sizes, with a cache of the sizes of items."""

    def __init__(self, processor: PromptProcessor, negatives: int):
        self.processor, self.negatives = processor, negatives
        self._cache = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": {}}

    def __call__(self, description: dict, name: str) -> Int[np.ndarray, "I 4"]:
        sizes = np.zeros((2 + self.negatives, 4), np.int32)
        sizes[0] = self.size(description["query"], "query", f"{name}, query")
        sizes[1] = self.size(description["positive"], "document", f"{name}, positive")
        for number, item in enumerate(description["negatives"][: self.negatives]):
            sizes[2 + number] = self.size(item, "document", f"{name}, negative {number}")
        return sizes

    def size(self, item: dict, side: str, name: str) -> Fitted:
        key = side, item.get("text"), item.get("image")
        if key not in self._cache:
            if len(self._cache) >= CACHED:
                self._cache = {}
            self._cache[key] = self.processor.size(item, side, name=name)
        return self._cache[key]

    def key(self, source: str) -> str:
        """Return a digest of a source's fingerprint and all that its sizes depend on, including the code of the processor."""
        probes = [self._probe(item, side) for item in PROBES for side in ("query", "document")]
        return digest(json.dumps([source, self.processor.fingerprint, self.negatives, probes]).encode())

    def _probe(self, item: dict, side: str) -> Sequence[int] | str:
        try:
            return self.processor.size(item, side, name="probe")
        except UserError as error:
            return str(error)


def _table(stored: Records, sizer: _Sizer, name: str) -> Int[np.ndarray, "R I 4"]:
    """Return the table of a prepared source. If it is missing, the first process computes and writes it; others wait."""
    file = stored.folder / f"sizes-{stored.split}-{sizer.key(stored.marker['fingerprint'])}.npy"
    shape = (len(stored), 2 + sizer.negatives, 4)
    if (table := _read_table(file, shape)) is not None:
        return table
    if not os.access(stored.folder, os.W_OK):
        print(f"{stored.folder} cannot be written: the sizes of its items are computed again each time", flush=True)
        return _compute(_SizeJob(stored, sizer, name))
    with locked(stored.folder / LOCK, f"another process computes the sizes of items in {stored.folder}; waiting for it", wait=True):
        if (table := _read_table(file, shape)) is None:
            table = _compute(_SizeJob(stored, sizer, name))
            with replacing(file) as target:
                np.save(target, table)
        return table


def _read_table(file: Path, shape: tuple[int, int, int]) -> Int[np.ndarray, "R I 4"] | None:
    """Return the table of a file; None if it is missing or damaged."""
    try:
        with file.open("rb") as stored:
            table = np.lib.format.read_array(stored)
    except (OSError, ValueError):  # ValueError: a damaged header, or too few bytes
        return None
    if table.shape != shape or table.dtype != np.int32:
        return None
    has_pairs = (table[:, :2, TOKENS] > 0).all()  # each query and positive has tokens; a lost page of a disk is zeros
    return table if has_pairs and (table >= 0).all() else None


class _SizeJob(NamedTuple):
    stored: Records
    sizer: _Sizer
    name: str


def _compute(job: _SizeJob) -> Int[np.ndarray, "R I 4"]:
    rows = len(job.stored)
    chunks = [range(first, min(first + CHUNK_ROWS, rows)) for first in range(0, rows, CHUNK_ROWS)]
    sizes = []
    with tqdm(total=rows, desc=f"{job.name}: sizes of items", unit="row", mininterval=0.5, delay=1) as bar:
        for chunk in map_with(job, _sizes_of, chunks, workers_for(rows)):
            sizes.append(chunk)
            bar.update(len(chunk))
    return np.concatenate(sizes)


def _sizes_of(job: _SizeJob, rows: range) -> Int[np.ndarray, "r I 4"]:
    return np.stack([job.sizer(job.stored.describe(row), f"source {job.name!r}, row {row}") for row in rows])
