"""Prepare a source: turn the rows of its files into records, in shards of ArrayRecord that several processes write.

    OUT/{source}/{version}.part/            while it is written
        job.json                            the files that are read; a preparation from other files starts over
        splits.json                         the rows that are not for training
        corpus.bin, corpus.json             the documents that rows name, if they name any
        pairs-train.array_record-00007-of-00098, 00007.described-train.jsonl, 00007.json      a shard, its descriptions, its counts
    OUT/{source}/{version}/                 complete, and readable by TensorFlow Datasets

A preparation that was killed resumes with the missing shards. `splits` chooses the rows of the splits
`validation` and `test`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from metaembed_jax.data.contents import content_digest
from metaembed_jax.data.sources import descriptions, records, splits
from metaembed_jax.data.sources.corpus import Corpus, remove_copy
from metaembed_jax.data.sources.image_files import unread_pages
from metaembed_jax.data.sources.row_files import Rows
from metaembed_jax.data.workers import map_with
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, replacing, write_bytes, write_json

VERSION = "2.0.0"
SHARD_ROWS = 1024
HELD_OUT = ("validation", "test")
DATASET = "pairs"  # its name in TensorFlow Datasets, which does not allow names such as A-OKVQA
TYPES = (
    ("text", lambda item: "image" not in item),
    ("image", lambda item: "text" not in item),
    ("image and text", lambda item: True),
)


@dataclasses.dataclass(frozen=True)
class RawSource:
    """A source before its preparation.

    Attributes:
      name: name of the source, and of its folder.
      rows: the rows of its files.
      record: turns a row into a record. It can be pickled, and its UserErrors do not name the row.
      corpus: the documents that rows name by id. They are copied first, and `record` then takes the copy as `corpus`.
      by_groups: rows with the same query or positive lie in one split. All rows are read once more, before the others.
    """

    name: str
    rows: Rows
    record: Callable[..., dict]
    corpus: Corpus | None = None
    by_groups: bool = False


@dataclasses.dataclass(frozen=True)
class _Job:
    """The paths of a source's shards. A process that writes several shards keeps the files that `source` opens."""

    source: RawSource
    directory: Path
    skips: int
    held_out: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def shards(self) -> int:
        return -(-len(self.source.rows) // SHARD_ROWS)

    def records(self, split: str, shard: int) -> Path:
        return self.directory / f"{DATASET}-{split}.array_record-{shard:05}-of-{self.shards:05}"

    def descriptions(self, split: str, shard: int) -> Path:
        return self.directory / f"{shard:05}.described-{split}.jsonl"

    def counts(self, shard: int) -> Path:
        return self.directory / f"{shard:05}.json"

    def read_counts(self, shard: int) -> dict | None:
        """Return the counts of a written shard; None if one of its files is missing."""
        is_written = self.counts(shard).is_file() and self.descriptions("train", shard).is_file()
        return json.loads(self.counts(shard).read_text()) if is_written else None


def prepare_source(source: RawSource, out: Path, workers: int, skips: int) -> dict:
    """Prepare a source in `out`/`source.name`, unless it is prepared already.

    Args:
      workers: number of processes next to this one.
      skips: the most bad rows to leave out, with a line for each; one more is an error.

    Returns:
      The marker: {"version", "fingerprint", "job" (digest of the files that were read), "groups" of rows that lie in one
      split, "rows" of each split, "held_out" numbers of different items, "queries" and "positives" of each type, "negatives",
      "bytes", "skipped"}.

    Raises:
      UserError: too many rows are bad, an id occurs twice (both name the first row), or the source is prepared from other files.
    """
    source_dir = out / source.name
    inputs = _inputs(source)
    if marker := records.read_marker(source_dir, VERSION):
        if marker["job"] != digest(inputs.encode()):
            file = source.rows.files[0]
            raise UserError(f"{source_dir} is prepared already, from other files than {file}; remove it, or choose another --out")
        return marker
    source_dir.mkdir(parents=True, exist_ok=True)
    with locked(source_dir / "lock", f"{source_dir} is being prepared by another process; wait for it to end"):
        return _write_all(source, source_dir / f"{VERSION}.part", inputs, workers, skips)


def _write_all(source: RawSource, directory: Path, inputs: str, workers: int, skips: int) -> dict:
    _make_directory(directory, inputs)
    if source.corpus:
        copy = source.corpus.copy(source.rows, directory, source.name)
        source = dataclasses.replace(source, record=functools.partial(source.record, corpus=copy), corpus=None)
    job = _Job(source, directory, skips)
    chosen = _splits(job, workers)
    job = dataclasses.replace(job, held_out={int(row): split for row, split in chosen["held_out"].items()})
    written = {shard: counts for shard in range(job.shards) if (counts := job.read_counts(shard)) is not None}
    missing = [shard for shard in range(job.shards) if shard not in written]
    with tqdm(total=len(source.rows), desc=source.name, unit="row", mininterval=0.5) as bar:
        bar.update(sum(counts["read"] for counts in written.values()))
        for shard, counts in zip(missing, map_with(job, _write_shard, missing, workers), strict=True):
            written[shard] = counts
            bar.update(counts["read"])
            _check_skipped(written, skips)
    _check_skipped(written, skips)
    return _finish(job, [written[shard] for shard in range(job.shards)], chosen["groups"])


def _inputs(source: RawSource) -> str:
    """Return the files to read, and the size of shards, as JSON."""
    read = (*source.rows.files, *(source.corpus.rows.files if source.corpus else ()))
    files = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in read]
    return json.dumps({"files": files, "rows": len(source.rows), "shard_rows": SHARD_ROWS})


def _make_directory(directory: Path, inputs: str) -> None:
    """Make the folder of a preparation, empty unless it holds shards of the same inputs."""
    file = directory / "job.json"
    if not file.is_file() or file.read_text() != inputs:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        file.write_text(inputs)


def _write_shard(job: _Job, shard: int) -> dict:
    """Write the records of a shard, then their descriptions and counts."""
    rows, first = job.source.rows, shard * SHARD_ROWS
    features = records.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]
    files = {split: job.directory / f"{shard:05}.{split}.tmp" for split in records.SPLITS}  # unique to the shard
    writers = {split: ArrayRecordWriter(str(file), "group_size:1") for split, file in files.items()}
    lines = {split: [] for split in records.SPLITS}
    counts = {"read": 0, "rows": dict.fromkeys(records.SPLITS, 0), "negatives": 0, "bytes": 0}
    counts |= {"unread_pages": 0, "skipped": []}
    counts |= {side: {name: 0 for name, _ in TYPES} for side in ("queries", "positives")}
    counts["held_out"] = {split: {"queries": [], "documents": []} for split in HELD_OUT}
    content = hashlib.sha256()
    for number, row in enumerate(rows.read(first, min(first + SHARD_ROWS, len(rows))), first):
        counts["read"] += 1
        try:
            record = job.source.record(row)
            line = descriptions.to_line(descriptions.describe(record, "record"))
        except UserError as error:
            counts["skipped"].append(f"{rows.row_name(number)}: {error}")
            if len(counts["skipped"]) > job.skips:
                break
            continue
        serialized = serializer.serialize_example(features.encode_example(records.to_example(record)))
        split = job.held_out.get(number, "train")
        writers[split].write(serialized)
        lines[split].append(line)
        content.update(_digest(record))
        counts["rows"][split] += 1
        if split in HELD_OUT:
            for side, item in (("queries", record["query"]), ("documents", record["positive"])):
                counts["held_out"][split][side].append(content_digest(item).hex())
        counts["bytes"] += len(serialized)
        counts["negatives"] += len(record["negatives"])
        items = record["query"], record["positive"], *record["negatives"]
        counts["unread_pages"] += sum(map(unread_pages, items))
        for side, item in (("queries", record["query"]), ("positives", record["positive"])):
            counts[side][next(name for name, fits in TYPES if fits(item))] += 1
    for writer in writers.values():
        writer.close()
    counts["digest"] = content.hexdigest()
    if len(counts["skipped"]) <= job.skips:
        for split, file in files.items():
            os.replace(file, job.records(split, shard))
            write_bytes(job.descriptions(split, shard), b"".join(lines[split]))
        write_json(job.counts(shard), counts)
    return counts


def _digest(record: dict) -> bytes:
    """Return a digest of the texts and images of a record; its bytes on disk may have their keys in any order."""
    items = [record["query"], record["positive"], *record["negatives"]]
    contents = [(item.get("text", ""), hashlib.sha256(item.get("image", b"")).hexdigest()) for item in items]
    return hashlib.sha256(repr((record["source"], contents)).encode()).digest()


def _splits(job: _Job, workers: int) -> dict:
    """Return the number of groups, and the split of each row that is not for training; they are chosen once a preparation."""
    file, rows = job.directory / "splits.json", len(job.source.rows)
    if not file.is_file():
        groups = np.arange(rows)
        if job.source.by_groups:
            contents = []
            with tqdm(total=rows, desc=f"{job.source.name}: equal items", unit="row", mininterval=0.5, delay=1) as bar:
                for shard in map_with(job, _contents, range(job.shards), workers):
                    contents += shard
                    bar.update(len(shard))
            groups = splits.groups_of(contents)
        write_json(file, {"groups": len(np.unique(groups)), "held_out": splits.held_out(groups)})
    return json.loads(file.read_text())


def _contents(job: _Job, shard: int) -> list[tuple[bytes, bytes] | None]:
    """Return digests of the query and the positive of each row of a shard; None for a bad row."""
    rows, first = job.source.rows, shard * SHARD_ROWS

    def contents(row: dict) -> tuple[bytes, bytes] | None:
        try:
            record = job.source.record(row)
        except UserError:  # named when the row is written
            return None
        return content_digest(record["query"]), content_digest(record["positive"])

    return [contents(row) for row in rows.read(first, min(first + SHARD_ROWS, len(rows)))]


def _check_skipped(written: dict[int, dict], skips: int) -> None:
    bad = [line for _, counts in sorted(written.items()) for line in counts["skipped"]]
    if len(bad) > skips:
        more = f" (and {len(bad) - 1} more so far; --skip allows {skips})" if len(bad) > 1 else "; --skip=N leaves out N bad rows"
        raise UserError(f"{bad[0]}{more}")


def _finish(job: _Job, shards: Sequence[dict], groups: int) -> dict:
    """Turn the shards into a folder of TensorFlow Datasets, and move it to its final path.

    Args:
      shards: the counts of each shard.
      groups: the number of groups of rows that share no query and no positive.
    """
    source, directory = job.source, job.directory
    skipped = [line for counts in shards for line in counts["skipped"]]
    for line in skipped:
        print(f"left out: {line}", flush=True)
    if pages := sum(counts["unread_pages"] for counts in shards):
        print(f"{source.name}: {pages:,} pages of TIFFs were not read; of each TIFF, the first page is", flush=True)
    rows = {split: [counts["rows"][split] for counts in shards] for split in records.SPLITS}
    if not any(rows["train"]):
        raise UserError(f"{source.rows.files[0]}: no rows are left for training")
    template = naming.ShardedFileTemplate(data_dir=directory, dataset_name=DATASET, filetype_suffix="array_record")  # pyright: ignore[reportArgumentType] (any path)
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=records.features(),
        split_infos=[tfds.core.SplitInfo(split, lengths, 0) for split, lengths in rows.items()],
        filename_template=template,
        check_data=False,
    )
    marker = {
        "version": VERSION,
        "fingerprint": digest("".join(counts["digest"] for counts in shards).encode()),
        "job": digest((directory / "job.json").read_bytes()),
        "groups": groups,
        "rows": {split: sum(lengths) for split, lengths in rows.items()},
        "held_out": {split: {side: _distinct(shards, split, side) for side in ("queries", "documents")} for split in HELD_OUT},
        **{side: {name: sum(counts[side][name] for counts in shards) for name, _ in TYPES} for side in ("queries", "positives")},
        "negatives": sum(counts["negatives"] for counts in shards),
        "bytes": sum(counts["bytes"] for counts in shards),
        "skipped": len(skipped),
    }
    remove_copy(directory)
    shard_descriptions = _join_descriptions(job)
    final = directory.with_name(VERSION)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(directory, final)
    for file in shard_descriptions:  # last, since a preparation that was killed resumes from them
        (final / file.name).unlink()
    records.write_marker(final.parent, marker)
    return marker


def _distinct(shards: Sequence[dict], split: str, side: str) -> int:
    return len(set().union(*(counts["held_out"][split][side] for counts in shards)))


def _join_descriptions(job: _Job) -> list[Path]:
    """Write one file of descriptions for each split, and return the files of the shards."""
    shard_files = {split: [job.descriptions(split, shard) for shard in range(job.shards)] for split in records.SPLITS}
    for split, files in shard_files.items():
        with replacing(descriptions.file_of(job.directory, split)) as target:
            for file in files:
                target.write(file.read_bytes())
    return [file for files in shard_files.values() for file in files]
