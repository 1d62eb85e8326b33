"""Descriptions of records: the same texts, and (width, height), upright, in place of each image.

    pairs-train.array_record-00007-of-00098     records
    described-train-00007-of-00098              the same rows as JSON, also in ArrayRecord

The sizes of all items of a source follow from them, and no image is read for it.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from metaembed_jax.files import locked, write_bytes
from metaembed_jax.inputs.images import image_size

LOCK = "described.lock"
READ_AHEAD = 64  # records that are read at once, with their images


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


def to_bytes(description: dict) -> bytes:
    """A description as it is stored."""
    return json.dumps(description).encode()


def from_bytes(raw: bytes) -> dict:
    """Inverse of `to_bytes`."""
    description = json.loads(raw)
    for item in (description["query"], description["positive"], *description["negatives"]):
        if "image" in item:
            item["image"] = tuple(item["image"])
    return description


def file_of(shard: Path) -> Path:
    """Where the descriptions of a shard of records are stored."""
    _, _, name = shard.name.partition("-")
    return shard.with_name("described-" + name.replace(".array_record", ""))  # with it, TFDS takes the file for one of its own


def open_files(shards: Sequence[Path]) -> ArrayRecordDataSource:
    """The stored descriptions of a split, for `from_bytes`. Survives pickling."""
    return ArrayRecordDataSource([str(file_of(shard)) for shard in shards])


def add(raw: Sequence[bytes], parse: Callable[[bytes], dict], shards: Sequence[Path], lengths: Sequence[int]) -> bool:
    """Writes the descriptions that a split lacks, shard by shard, with a progress bar; a killed run goes on with the next shard.

    Processes that come at the same time wait for the first. A folder that cannot be written stays as it is, which is printed.

    Args:
      raw: the stored records of the split.
      parse: makes a record of one.
      shards, lengths: the files of the split, and how many records each holds.

    Returns:
      Whether all records have descriptions now.

    Raises:
      UserError: an image cannot be read, or the disk is full.
    """
    if all(map(_is_complete, shards, lengths)):
        return True
    folder = shards[0].parent
    if not os.access(folder, os.W_OK):
        print(f"{folder} cannot be written: sizes of items are read from its records, which takes longer", flush=True)
        return False
    with locked(folder / LOCK, f"another process reads the sizes of images in {folder}; waiting for it", wait=True):
        _write_missing(raw, parse, shards, lengths)
    return True


def _is_complete(shard: Path, length: int) -> bool:
    """Return whether a shard has all its descriptions; a file that a crash left empty, or that is missing, reads as no rows."""
    file = file_of(shard)
    return file.is_file() and len(ArrayRecordDataSource([str(file)])) == length


def _write_missing(raw: Sequence[bytes], parse: Callable[[bytes], dict], shards: Sequence[Path], lengths: Sequence[int]) -> None:
    firsts = itertools.accumulate(lengths, initial=0)
    source = shards[0].parent.parent.name
    with tqdm(total=len(raw), desc=f"{source}: sizes of images", unit="row", mininterval=0.5) as bar:
        for shard, first, length in zip(shards, firsts, lengths, strict=False):
            if _is_complete(shard, length):
                bar.update(length)
                continue
            write_bytes(file_of(shard), _shard(_described(raw, parse, range(first, first + length), source, bar)))


def _described(raw: Sequence[bytes], parse: Callable[[bytes], dict], rows: range, source: str, bar: tqdm) -> Iterator[bytes]:
    for first in range(rows.start, rows.stop, READ_AHEAD):
        numbers = range(first, min(first + READ_AHEAD, rows.stop))
        for number, record in zip(numbers, raw.__getitems__(list(numbers)), strict=True):
            yield to_bytes(describe(parse(record), f"source {source!r}, row {number}"))
            bar.update()


def _shard(rows: Iterator[bytes]) -> bytes:
    """The content of an ArrayRecord file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "described"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
        return file.read_bytes()
