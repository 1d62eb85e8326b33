"""Tables of rows to prepared sources: records in shards of ArrayRecord, written side by side, each of them once.

    OUT/{source}/{version}.part/            while it is written
        job.json                            what is being prepared: another job starts anew
        corpus.bin, corpus.json             the documents that rows name, where they do
        pairs-train.array_record-00007-of-00098, 00007.described-train.jsonl, 00007.json      a shard, then what is known of it
    OUT/{source}/{version}/                 complete, and readable by TensorFlow Datasets

A killed preparation goes on with the shards that are missing. `HELD_OUT` rows each, drawn once from all, are the splits
`validation` and `test`; a small source gives a tenth of its rows at most.
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

from metaembed_jax.data.sources import described, records
from metaembed_jax.data.sources.corpus import Corpus, remove_copy
from metaembed_jax.data.sources.tables import Table, read_columns
from metaembed_jax.data.workers import map_with
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, locked, replacing, write_bytes, write_json

VERSION = "1.0.0"
SHARD_ROWS = 1024
HELD_OUT = 256
FILES = "pairs"  # what TensorFlow Datasets calls the data set, which knows no names such as A-OKVQA
TYPES = (
    ("text", lambda item: "image" not in item),
    ("image", lambda item: "text" not in item),
    ("image and text", lambda item: True),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What becomes one prepared source.

    Attributes:
      name: of the source, and of its folder.
      table: its rows.
      record: a row to a record. Survives pickling; raises UserError without naming the row.
      corpus: the documents that rows name by id. They are copied first; `record` is given what reads them, as `corpus`.
    """

    name: str
    table: Table
    record: Callable[..., dict]
    corpus: Corpus | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """The shards of a part. A process that writes several of them keeps what `part` opens: tables, archives."""

    part: Part
    directory: Path
    skips: int

    @property
    def shards(self) -> int:
        return -(-len(self.part.table) // SHARD_ROWS)

    def path(self, split: str, shard: int) -> Path:
        return self.directory / f"{FILES}-{split}.array_record-{shard:05}-of-{self.shards:05}"

    def described(self, split: str, shard: int) -> Path:
        return self.directory / f"{shard:05}.described-{split}.jsonl"

    def about(self, shard: int) -> Path:
        return self.directory / f"{shard:05}.json"

    def done(self, shard: int) -> dict | None:
        """Read the metadata of a written shard; None where a file of it is missing."""
        whole = self.about(shard).is_file() and self.described("train", shard).is_file()
        return json.loads(self.about(shard).read_text()) if whole else None


def need_columns(table: Table, names: Sequence[str]) -> None:
    """Raises UserError, naming file and columns, where a file lacks one."""
    for file in table.files:
        there = read_columns(file)
        if missing := [name for name in names if name not in there]:
            raise UserError(f"{file}: lacks the column {', '.join(missing)}; it has {', '.join(sorted(there))}")


def write_part(part: Part, out: Path, workers: int, skips: int) -> dict:
    """Prepares one part in `out`/`part.name`; already done, does nothing.

    Args:
      workers: processes beside this one; 0 for none.
      skips: how many bad rows are left out, with a line for each, before the next one stops the job.

    Returns:
      The marker: {"version", "fingerprint", "job" (of the files that were read), "rows" of each split, "queries" and "positives" of
      each type, "negatives", "bytes", "skipped"}.

    Raises:
      UserError: too many bad rows, or an id twice; names the first by file and row. Or the source is there, and from other files.
    """
    source_dir = out / part.name
    described = _describe(part)
    if marker := records.read_marker(source_dir, VERSION):
        if marker["job"] != digest(described.encode()):
            file = part.table.files[0]
            raise UserError(f"{source_dir}: is prepared already, from other files than {file}; remove it, or choose another --out")
        return marker
    source_dir.mkdir(parents=True, exist_ok=True)
    with locked(source_dir / "lock", f"{source_dir} is being prepared by another process; wait for it to end"):
        return _write_all(part, source_dir / f"{VERSION}.part", described, workers, skips)


def _write_all(part: Part, directory: Path, described: str, workers: int, skips: int) -> dict:
    _start(directory, described)
    if part.corpus:
        copied = part.corpus.copy(part.table, directory, part.name)
        part = dataclasses.replace(part, record=functools.partial(part.record, corpus=copied), corpus=None)
    job = _Job(part, directory, skips)
    bar = tqdm(total=len(part.table), desc=part.name, unit="row", mininterval=0.5)
    done = [job.done(shard) for shard in range(job.shards)]
    bar.update(sum(one["read"] for one in done if one))
    todo = [number for number, one in enumerate(done) if one is None]
    with bar:
        for number, one in zip(todo, map_with(job, _write_shard, todo, workers), strict=True):
            done[number] = one
            bar.update(one["read"])
            _refuse(done, skips, bar)
    _refuse(done, skips, bar)
    return _finish(job, done)


def _describe(part: Part) -> str:
    """Says which files are read, and how they are cut."""
    read = (*part.table.files, *(part.corpus.table.files if part.corpus else ()))
    files = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in read]
    return json.dumps({"files": files, "rows": len(part.table), "shard_rows": SHARD_ROWS})


def _start(directory: Path, described: str) -> None:
    """Makes the folder of a job, empty unless it holds shards of this very one."""
    file = directory / "job.json"
    if not file.is_file() or file.read_text() != described:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        file.write_text(described)


def _write_shard(job: _Job, shard: int) -> dict:
    """Writes the rows of one shard, and then what there is to know of them."""
    table, first = job.part.table, shard * SHARD_ROWS
    features = records.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    held = _held_out(len(table))
    files = {split: job.directory / f"{shard:05}.{split}.tmp" for split in records.SPLITS}  # no other shard's
    writers = {split: ArrayRecordWriter(str(file), "group_size:1") for split, file in files.items()}
    lines = {split: [] for split in records.SPLITS}
    about = {"read": 0, "rows": dict.fromkeys(records.SPLITS, 0), "negatives": 0, "bytes": 0, "skipped": []}
    about |= {side: {name: 0 for name, _ in TYPES} for side in ("queries", "positives")}
    content = hashlib.sha256()
    for number, row in enumerate(table.read(first, min(first + SHARD_ROWS, len(table))), first):
        about["read"] += 1
        try:
            made = job.part.record(row)
            line = described.to_line(described.describe(made, "record"))
        except UserError as error:
            about["skipped"].append(f"{table.place(number)}: {error}")
            if len(about["skipped"]) > job.skips:
                break
            continue
        raw = serializer.serialize_example(features.encode_example(records.to_example(made)))
        split = held.get(number, "train")
        writers[split].write(raw)
        lines[split].append(line)
        content.update(_digest(made))
        about["rows"][split] += 1
        about["bytes"] += len(raw)
        about["negatives"] += len(made["negatives"])
        for side, item in (("queries", made["query"]), ("positives", made["positive"])):
            about[side][next(name for name, fits in TYPES if fits(item))] += 1
    for writer in writers.values():
        writer.close()
    if len(about["skipped"]) <= job.skips:
        for split, file in files.items():
            os.replace(file, job.path(split, shard))
            write_bytes(job.described(split, shard), b"".join(lines[split]))
        write_json(job.about(shard), about | {"digest": content.hexdigest()})
    return about | {"digest": content.hexdigest()}


def _digest(record: dict) -> bytes:
    """Of what a record says; its bytes on disk may have their keys in any order."""
    items = [record["query"], record["positive"], *record["negatives"]]
    said = [(item.get("text", ""), hashlib.sha256(item.get("image", b"")).hexdigest()) for item in items]
    return hashlib.sha256(repr((record["source"], said)).encode()).digest()


def _held_out(rows: int) -> dict[int, str]:
    """The rows that are not trained on, and their split."""
    count = min(HELD_OUT, rows // 20)
    chosen = np.random.default_rng(0).permutation(rows)[: 2 * count].tolist()
    return {row: "validation" if place < count else "test" for place, row in enumerate(chosen)}


def _refuse(done: Sequence[dict | None], skips: int, bar: tqdm) -> None:
    bad = [line for one in done if one for line in one["skipped"]]
    if len(bad) > skips:
        more = f" (and {len(bad) - 1} more so far; --skip allows {skips})" if len(bad) > 1 else "; --skip=N leaves out N bad rows"
        raise UserError(f"{bad[0]}{more}")


def _finish(job: _Job, done: Sequence[dict]) -> dict:
    """Makes a folder of TensorFlow Datasets out of the shards, and moves it to its place."""
    part, directory = job.part, job.directory
    for one in done:
        for line in one["skipped"]:
            print(f"left out: {line}", flush=True)
    if not any(one["rows"]["train"] for one in done):
        raise UserError(f"{part.table.files[0]}: no row is left to train on")
    template = naming.ShardedFileTemplate(data_dir=directory, dataset_name=FILES, filetype_suffix="array_record")
    lengths = {split: [one["rows"][split] for one in done] for split in records.SPLITS}
    splits = [tfds.core.SplitInfo(split, length, 0) for split, length in lengths.items()]
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=records.features(), split_infos=splits, filename_template=template, check_data=False
    )

    def total(*keys):
        values = []
        for one in done:
            for key in keys:
                one = one[key]
            values.append(one)
        return sum(values)

    marker = {
        "version": VERSION,
        "fingerprint": digest("".join(one["digest"] for one in done).encode()),
        "job": digest((directory / "job.json").read_bytes()),
        "rows": {split: sum(length) for split, length in lengths.items()},
        **{side: {name: total(side, name) for name, _ in TYPES} for side in ("queries", "positives")},
        "negatives": total("negatives"),
        "bytes": total("bytes"),
        "skipped": sum(len(one["skipped"]) for one in done),
    }
    remove_copy(directory)
    described_parts = _join_descriptions(job)
    final = directory.with_name(VERSION)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(directory, final)
    for file in described_parts:  # only here: a preparation that is killed before goes on from them
        (final / file.name).unlink()
    records.write_marker(final.parent, marker)
    return marker


def _join_descriptions(job: _Job) -> list[Path]:
    """Writes one file of descriptions for each split, and returns those of the shards."""
    parts = {split: [job.described(split, shard) for shard in range(job.shards)] for split in records.SPLITS}
    for split, files in parts.items():
        with replacing(described.file_of(job.directory, split)) as target:
            for file in files:
                target.write(file.read_bytes())
    return [file for files in parts.values() for file in files]
