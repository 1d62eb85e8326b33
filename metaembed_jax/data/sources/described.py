"""Descriptions of records: the same texts, and (width, height), upright, in place of each image.

    pairs-train.array_record-00007-of-00098     records
    described-train.jsonl                       a line for each record of the split

The sizes of all items of a source follow from them, and no image is read for it.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from metaembed_jax.data.workers import map_with, workers_for
from metaembed_jax.errors import UserError
from metaembed_jax.files import locked, replacing
from metaembed_jax.inputs.images import image_size

LOCK = "described.lock"
BLOCK = 64  # records that are read at once, with their images
SCANNED = 1 << 24  # bytes of a file that are searched for line ends at once


def describe(record: dict, name: str) -> dict:
    """The record with (width, height), upright, in place of each image.

    Args:
      name: of the record, for errors.

    Raises:
      UserError: an image cannot be read.
    """

    def item(side: str, content: dict) -> dict:
        return content | {"image": image_size(content["image"], f"{name}, {side}")} if "image" in content else content

    return record | {
        "query": item("query", record["query"]),
        "positive": item("positive", record["positive"]),
        "negatives": [item(f"negative {number}", content) for number, content in enumerate(record.get("negatives", ()))],
    }


def describe_row(source: Sequence, row: int, epoch: int, step: int, name: str) -> dict:
    """The description of the record that a source has for a row in an epoch and step, without its images where the source can.

    Args:
      name: of the source, for errors.
    """
    if hasattr(source, "described"):
        return source.described(row, epoch, step)
    record = source.compose(row, epoch, step) if hasattr(source, "compose") else source[row]
    return describe(record, f"source {name!r}, row {row}")


def to_line(description: dict) -> bytes:
    """A description as it is stored, with its line feed."""
    return json.dumps(description).encode() + b"\n"


def from_line(line: bytes) -> dict:
    """Inverse of `to_line`."""
    description = json.loads(line)
    for item in (description["query"], description["positive"], *description["negatives"]):
        if "image" in item:
            item["image"] = tuple(item["image"])
    return description


def file_of(folder: Path, split: str) -> Path:
    """Where the descriptions of a split are stored."""
    return folder / f"described-{split}.jsonl"


class Descriptions(Sequence):
    """The stored descriptions of a split, mapped into memory. Survives pickling."""

    def __init__(self, file: Path):
        self._file = file
        self._content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        firsts = range(0, len(self._content), SCANNED)
        ends = [np.flatnonzero(self._content[first : first + SCANNED] == ord("\n")) + first for first in firsts]
        self._ends = np.concatenate([[-1], *ends])

    @property
    def is_whole(self) -> bool:
        """The last line has its end."""
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


class Undescribed(NamedTuple):
    """A split without descriptions.

    Attributes:
      raw: its stored records.
      parse: makes a record of one.
      name: of the source, for errors.
    """

    raw: Sequence[bytes]
    parse: Callable[[bytes], dict]
    name: str


def open_or_add(split: Undescribed, file: Path) -> Descriptions | None:
    """The descriptions of a split, which are written first where they are missing, with a progress bar.

    Processes that come at the same time wait for the first. A folder that cannot be written stays as it is, which is printed.

    Returns:
      None where they cannot be written.

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


def _read(split: Undescribed, file: Path) -> Descriptions | None:
    """The descriptions in a file, or None where it is missing, or has not one line for each record."""
    if not file.is_file():
        return None
    descriptions = Descriptions(file)
    return descriptions if len(descriptions) == len(split.raw) and descriptions.is_whole else None


def _write(split: Undescribed, file: Path) -> None:
    rows = len(split.raw)
    blocks = [range(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK)]
    with tqdm(total=rows, desc=f"{split.name}: sizes of images", unit="row", mininterval=0.5) as bar, replacing(file) as target:
        for block, lines in zip(blocks, map_with(split, _lines, blocks, workers_for(rows)), strict=True):
            target.write(lines)
            bar.update(len(block))


def _lines(split: Undescribed, rows: range) -> bytes:
    records = map(split.parse, split.raw.__getitems__(list(rows)))
    return b"".join(
        to_line(describe(record, f"source {split.name!r}, row {row}")) for row, record in zip(rows, records, strict=True)
    )


def summary(splits: Sequence[Sequence]) -> str:
    """A line about the items of a source.

    Args:
      splits: sequences with `described`.
    """
    images, texts, largest, longest = 0, 0, (0, 0), 0
    for description in (split.described(row) for split in splits for row in range(len(split))):
        for item in (description["query"], description["positive"], *description["negatives"]):
            if "image" in item:
                images, largest = images + 1, max(largest, item["image"], key=math.prod)
            if "text" in item:
                texts, longest = texts + 1, max(longest, len(item["text"]))
    pictures = f"{images} images, the largest {largest[0]}x{largest[1]}" if images else "no image"
    words = f"{texts} texts, the longest of {longest} characters" if texts else "no text"
    return f"{pictures}; {words}"
