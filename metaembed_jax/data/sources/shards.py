"""The shards of a source, of `SHARD_ROWS` rows each: several processes write them, and one is kept while its rows are the same.

    shards/00007.train.array_record         its records in a split, until the source is complete
    shards/00007.described-train.jsonl      their descriptions
    shards/00007.digests.json               the stamps of its rows, and digests of their queries and positives, for the splits
    shards/00007.json                       the stamps of its rows, and counts; written last

The stamp of a row depends on its values, on size and time of each image file that it names, which is not opened for it, and on the
memory that an image may take.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from metaembed_jax.data.digests import content_digest
from metaembed_jax.data.sources import descriptions, records
from metaembed_jax.data.sources.candidates import NUMBERS, further_positives
from metaembed_jax.data.sources.corpus import Corpus
from metaembed_jax.data.sources.image_files import unread_pages
from metaembed_jax.data.sources.row_files import Rows, read_each
from metaembed_jax.data.stamps import stamp_of
from metaembed_jax.errors import UserError
from metaembed_jax.files import write_bytes, write_json
from metaembed_jax.inputs.images import memory_limit

SHARD_ROWS = 1024
FOLDER = "shards"
DATASET = "pairs"  # name of a source in TensorFlow Datasets, which does not allow names such as A-OKVQA
TYPES = (
    ("text", lambda item: "image" not in item),
    ("image", lambda item: "text" not in item),
    ("image and text", lambda item: True),
)


@dataclasses.dataclass(frozen=True)
class RawSource:
    """A source before its preparation. The functions can be pickled.

    Attributes:
      name: name of the source, and of its folder.
      rows: the rows of its files.
      record: turns a row into a record. Its UserErrors do not name the row.
      images: returns the stamps of the image files that a row names, as `ImageFolder.stamps` does.
      corpus: the documents that rows name by id. They are copied first, and `record` then takes the copy as `corpus`.
      keep_components_together: rows with the same query or positive are in the same split. All rows and their images are read
        once more, before the others.
      held_out: the split of each row that is not for training; None: `splits` chooses it.
      key: a digest of what rows depend on besides files.
      facts: further entries of the marker.
    """

    name: str
    rows: Rows
    record: Callable[..., dict]
    images: Callable[[dict], list[tuple]]
    corpus: Corpus | None = None
    keep_components_together: bool = False
    held_out: dict[int, str] | None = None
    key: str = ""
    facts: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """The preparation of a source. Can be pickled, for worker processes, which keep the files that `source` opens.

    Attributes:
      directory: the folder of the preparation.
      skips: the most bad rows.
      inputs: digest of the files that are read, but for images that they name.
      corpus: stamp of the corpus; empty without one.
      held_out: the split of each row that is not for training.
    """

    source: RawSource
    directory: Path
    skips: int
    inputs: str
    corpus: str = ""
    held_out: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self.source.rows) // SHARD_ROWS)

    @property
    def whole_inputs(self) -> str:
        """`inputs` and `corpus`: all that rows depend on, but for image files that they name themselves."""
        return self.inputs + self.corpus

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard, and the row after its last one."""
        return shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(self.source.rows))

    def read(self, shard: int) -> Iterator[tuple[int, dict | UserError, int, int]]:
        """Yield (number, row or what is wrong with it, stamp, number of image files that it names) of each row of a shard.

        The stamp is taken before the images are read: of one that changes meanwhile it is out of date, and is noticed next time.
        """
        for number, row in read_each(self.source.rows.read, *self.bounds(shard)):
            images = self.source.images(row) if isinstance(row, dict) else []
            content = row if isinstance(row, dict) else str(row)
            yield number, row, stamp_of((memory_limit(), self.corpus, content, images)), len(images)

    def held_out_in(self, shard: int) -> dict[str, str]:
        """Return the splits of the rows of a shard that are not for training, by row, as JSON has them."""
        return {str(row): self.held_out[row] for row in range(*self.bounds(shard)) if row in self.held_out}


def read_stamps(job: Job, shard: int) -> list[int]:
    """Return the stamps of the rows of a shard as they are now."""
    return [stamp for _, _, stamp, _ in job.read(shard)]


def write_digests(job: Job, shard: int) -> dict:
    """Write digests of the query and the positives of each row of a shard (null for a bad row), and return the file's content."""
    content = {"inputs": job.whole_inputs, "images": 0, "stamps": [], "digests": []}
    for _, row, stamp, images in job.read(shard):
        digests = None
        if isinstance(row, dict):
            try:
                record = job.source.record(row)
                items = record["query"], record["positive"], *further_positives(record)
                digests = [content_digest(item).hex() for item in items]
            except UserError:  # named when the row is written
                pass
        content["images"] += images
        content["stamps"].append(stamp)
        content["digests"].append(digests)
    write_json(digests_file(job.directory, shard), content)
    return content


def write_shard(job: Job, shard: int) -> dict:
    """Write the records of a shard, then their descriptions and counts, which are returned."""
    features = records.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]
    counts_file(job.directory, shard).unlink(missing_ok=True)
    files = {split: staged_file(job.directory, split, shard).with_suffix(".tmp") for split in records.SPLITS}
    writers = {split: ArrayRecordWriter(str(file), "group_size:1") for split, file in files.items()}
    lines = {split: [] for split in records.SPLITS}
    counts = _no_counts(job, shard)
    content = hashlib.sha256()
    for number, row, stamp, images in job.read(shard):
        counts["read"] += 1
        counts["stamps"].append(stamp)
        counts["images"] += images
        try:
            if isinstance(row, UserError):
                raise row
            record = job.source.record(row)
            line = descriptions.to_line(descriptions.describe(record, "record"))
        except UserError as error:
            counts["left_out"].append([job.source.rows.row_name(number), str(error)])
            if len(counts["left_out"]) > job.skips:
                break
            continue
        example = serializer.get_tf_example(features.encode_example(records.to_example(record)))
        serialized = example.SerializeToString(deterministic=True)  # the order of its keys is random otherwise
        split = job.held_out.get(number, "train")
        writers[split].write(serialized)
        lines[split].append(line)
        content.update(_digest(record))
        counts["bytes"] += len(serialized)
        _count(counts, record, split)
    for writer in writers.values():
        writer.close()
    counts["digest"] = content.hexdigest()
    if len(counts["left_out"]) <= job.skips:
        for split, file in files.items():
            os.replace(file, staged_file(job.directory, split, shard))
            write_bytes(descriptions_file(job.directory, split, shard), b"".join(lines[split]))
        write_json(counts_file(job.directory, shard), counts)
    return counts


def _no_counts(job: Job, shard: int) -> dict:
    counts = {
        "inputs": job.whole_inputs,
        "read": 0,
        "images": 0,
        "negatives": 0,
        **dict.fromkeys(NUMBERS, 0),
        "bytes": 0,
        "unread_pages": 0,
        "left_out": [],
        "stamps": [],
    }
    counts |= {"rows": dict.fromkeys(records.SPLITS, 0), "held_out_rows": job.held_out_in(shard)}
    counts |= {side: {name: 0 for name, _ in TYPES} for side in ("queries", "positives")}
    return counts | {"held_out": {split: {"queries": [], "documents": []} for split in records.HELD_OUT_SPLITS}}


def _count(counts: dict, record: dict, split: str) -> None:
    counts["rows"][split] += 1
    counts["negatives"] += len(record["negatives"])
    for name in NUMBERS:
        counts[name] += bool(record.get(name))
    counts["unread_pages"] += sum(map(unread_pages, (record["query"], record["positive"], *record["negatives"])))
    for side, held_out, item in (("queries", "queries", record["query"]), ("positives", "documents", record["positive"])):
        counts[side][next(name for name, fits in TYPES if fits(item))] += 1
        if split in records.HELD_OUT_SPLITS:
            items = [item, *further_positives(record)] if held_out == "documents" else [item]
            counts["held_out"][split][held_out] += [content_digest(item).hex() for item in items]


def _digest(record: dict) -> bytes:
    """Return a digest of the texts, images and numbers of a record."""
    items = [record["query"], record["positive"], *record["negatives"]]
    numbers = [record[name] for name in NUMBERS if record.get(name)]
    return hashlib.sha256(repr((record["source"], [content_digest(item) for item in items], *numbers)).encode()).digest()


def counts_file(directory: Path, shard: int) -> Path:
    """Return the file of a shard's counts."""
    return directory / FOLDER / f"{shard:05}.json"


def digests_file(directory: Path, shard: int) -> Path:
    """Return the file of the digests of a shard's items."""
    return directory / FOLDER / f"{shard:05}.digests.json"


def descriptions_file(directory: Path, split: str, shard: int) -> Path:
    """Return the file of a shard's descriptions."""
    return directory / FOLDER / f"{shard:05}.described-{split}.jsonl"


def staged_file(directory: Path, split: str, shard: int) -> Path:
    """Return the file of a shard's records while the source is prepared."""
    return directory / FOLDER / f"{shard:05}.{split}.array_record"


def stored_file(directory: Path, split: str, shard: int) -> Path | None:
    """Return the file of a shard's records, staged or in a complete source; None if it is missing."""
    staged = staged_file(directory, split, shard)
    names = f"{DATASET}-{split}.array_record-{shard:05}-of-*"
    return staged if staged.is_file() else next(iter(sorted(directory.glob(names))), None)


def read_counts(directory: Path, shard: int) -> dict | None:
    """Return the counts of a written shard; None if one of its files is missing."""
    file = counts_file(directory, shard)
    parts = [(stored_file(directory, split, shard), descriptions_file(directory, split, shard)) for split in records.SPLITS]
    if not file.is_file() or not all(content and lines.is_file() for content, lines in parts):
        return None
    return json.loads(file.read_text())


def read_digests(directory: Path, shard: int) -> dict | None:
    """Return the content of the file that `write_digests` writes; None if it is missing."""
    file = digests_file(directory, shard)
    return json.loads(file.read_text()) if file.is_file() else None


def link_shard(source: Path, target: Path, shard: int) -> None:
    """Add a shard of one folder to another, its counts last. Both then share its files."""
    files: list[tuple[Path | None, Path]] = [(digests_file(source, shard), digests_file(target, shard))]
    for split in records.SPLITS:
        files.append((stored_file(source, split, shard), staged_file(target, split, shard)))
        files.append((descriptions_file(source, split, shard), descriptions_file(target, split, shard)))
    for old, new in (*files, (counts_file(source, shard), counts_file(target, shard))):
        if old and old.is_file():
            new.unlink(missing_ok=True)
            try:
                os.link(old, new)
            except OSError:  # a file system without links
                shutil.copyfile(old, new)


def changed_rows(before: list[int], now: list[int]) -> list[int]:
    """Return the indices at which stamps differ, or only one list has one."""
    return [index for index, pair in enumerate(itertools.zip_longest(before, now)) if pair[0] != pair[1]]
