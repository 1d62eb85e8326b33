"""Descriptions of records: the same texts, and (width, height), upright, in place of each image.

    pairs-train.array_record-00007-of-00098     records
    described-train.jsonl                       a line for each record of the split

They give the sizes of all items of a source without reading an image.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from metaembed_jax.data.workers import map_with, workers_for
from metaembed_jax.errors import UserError
from metaembed_jax.files import locked, replacing
from metaembed_jax.inputs.images import image_size

LOCK = "described.lock"
CHUNK_RECORDS = 64  # records that are read at once, with their images
SCANNED = 1 << 24  # bytes of a file in which line ends are searched at once


def describe(record: dict, name: str) -> dict:
    """Return the description of a record.

    Args:
      name: name of the record, for errors.

    Raises:
      UserError: an image cannot be read.
    """

    def sized(role: str, item: dict) -> dict:
        return item | {"image": image_size(item["image"], f"{name}, {role}")} if "image" in item else item

    return record | {
        "query": sized("query", record["query"]),
        "positive": sized("positive", record["positive"]),
        "negatives": [sized(f"negative {number}", item) for number, item in enumerate(record.get("negatives", ()))],
    }


def read_row(source: Sequence, row: int, epoch: int, step: int) -> dict:
    """Return a source's record for a row, an epoch and a step, composed if the source has `compose`; see `data.sources`."""
    compose = getattr(source, "compose", None)
    return source[row] if compose is None else compose(row, epoch, step)


def describe_row(source: Sequence, row: int, epoch: int, step: int, name: str) -> dict:
    """Return the description of the record that `read_row` returns, without reading it if the source has `describe`.

    Args:
      name: name of the source, for errors.
    """
    describe_at = getattr(source, "describe", None)
    if describe_at is not None:
        return describe_at(row, epoch, step)
    return describe(read_row(source, row, epoch, step), f"source {name!r}, row {row}")


def to_line(description: dict) -> bytes:
    """Return a description as a line of JSON."""
    return json.dumps(description).encode() + b"\n"


def from_line(line: bytes) -> dict:
    """Return the description of a line; inverse of `to_line`."""
    description = json.loads(line)
    for item in (description["query"], description["positive"], *description["negatives"]):
        if "image" in item:
            item["image"] = tuple(item["image"])
    return description


def file_of(folder: Path, split: str) -> Path:
    """Return the file of a split's descriptions."""
    return folder / f"described-{split}.jsonl"


class Descriptions(Sequence):
    """The stored descriptions of a split, mapped into memory. Can be pickled."""

    def __init__(self, file: Path):
        self._file = file
        self._content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        firsts = range(0, len(self._content), SCANNED)
        ends = [np.flatnonzero(self._content[first : first + SCANNED] == ord("\n")) + first for first in firsts]
        self._ends = np.concatenate([[-1], *ends])

    @property
    def is_complete(self) -> bool:
        """True if the last line has its end."""
        return self._ends[-1] + 1 == len(self._content)

    def __reduce__(self) -> tuple:
        return Descriptions, (self._file,)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> dict:
        line = self._content[self._ends[row] + 1 : self._ends[row + 1]].tobytes()
        try:
            return from_line(line)
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self._file}, line {row + 1} is damaged; remove the file, and it is written again") from None


class StoredSplit(NamedTuple):
    """A prepared split, to be described.

    Attributes:
      source: tfds's data source: serialized records, with `__getitems__`.
      parse: turns a serialized record into a record.
      name: name of the source, for errors.
    """

    source: Any
    parse: Callable[[bytes], dict]
    name: str


def open_or_write(split: StoredSplit, file: Path) -> Descriptions | None:
    """Return the descriptions of a split. If they are missing, they are written first, with a progress bar.

    Processes that come at the same time wait for the first.

    Returns:
      None, after a message, if they are missing and the folder cannot be written.

    Raises:
      UserError: an image cannot be read, or the disk is full.
    """
    if (descriptions := _read(split, file)) is None:
        if not os.access(file.parent, os.W_OK):
            print(f"{file.parent} cannot be written: sizes of items are read from its records, which takes longer", flush=True)
            return None
        busy = f"another process reads the sizes of images in {file.parent}; waiting for it"
        with locked(file.parent / LOCK, busy, wait=True):
            if (descriptions := _read(split, file)) is None:
                _write(split, file)
                descriptions = Descriptions(file)
    return descriptions


def _read(split: StoredSplit, file: Path) -> Descriptions | None:
    """Return the descriptions in a file; None if it is missing, or does not have one line for each record."""
    if not file.is_file():
        return None
    descriptions = Descriptions(file)
    return descriptions if len(descriptions) == len(split.source) and descriptions.is_complete else None


def _write(split: StoredSplit, file: Path) -> None:
    rows = len(split.source)
    chunks = [range(first, min(first + CHUNK_RECORDS, rows)) for first in range(0, rows, CHUNK_RECORDS)]
    with tqdm(total=rows, desc=f"{split.name}: sizes of images", unit="row", mininterval=0.5) as bar, replacing(file) as target:
        for chunk, lines in zip(chunks, map_with(split, _lines, chunks, workers_for(rows)), strict=True):
            target.write(lines)
            bar.update(len(chunk))


def _lines(split: StoredSplit, rows: range) -> bytes:
    records = map(split.parse, split.source.__getitems__(list(rows)))
    return b"".join(
        to_line(describe(record, f"source {split.name!r}, row {row}")) for row, record in zip(rows, records, strict=True)
    )


def summarize(descriptions: Iterable[dict]) -> str:
    """Return a line about the items of a source: their numbers, the largest image and the longest text."""
    images, texts, largest, longest = 0, 0, (0, 0), 0
    for description in descriptions:
        for item in (description["query"], description["positive"], *description["negatives"]):
            if "image" in item:
                images, largest = images + 1, max(largest, item["image"], key=math.prod)
            if "text" in item:
                texts, longest = texts + 1, max(longest, len(item["text"]))
    image_summary = f"{images} images, the largest {largest[0]}x{largest[1]}" if images else "no images"
    text_summary = f"{texts} texts, the longest of {longest} characters" if texts else "no texts"
    return f"{image_summary}; {text_summary}"
