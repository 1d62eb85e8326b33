"""The one record of every source, how it lies on disk, and how it is read back.

    item   = {"text": str (optional), "image": encoded bytes (optional)}
    record = {"query": item, "positive": item, "negatives": [item, ...], "source": str}

On disk a record is a `tf.Example` in ArrayRecord, written by TensorFlow Datasets (TensorFlow itself is never imported); a text or
image that an item lacks is the empty string. Images stay encoded: nothing is decoded before a batch needs it. What their sizes
are is stored beside them: see `described`.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from metaembed_jax.data.sources import described
from metaembed_jax.errors import UserError
from metaembed_jax.files import write_json

SPLITS = ("train", "validation", "test")
MARKER = "prepared.json"  # written last, so a source that has it is complete


def features() -> tfds.features.FeaturesDict:
    """The record schema as TFDS features. A picture is a `Tensor` of bytes, because TFDS would decode an `Image` on reading."""

    def item():
        return {"text": tfds.features.Text(), "image": tfds.features.Tensor(shape=(), dtype=np.object_)}

    negatives = tfds.features.Sequence(item())
    return tfds.features.FeaturesDict({"query": item(), "positive": item(), "negatives": negatives, "source": tfds.features.Text()})


def to_example(record: dict) -> dict:
    """A record with every field present, as `features()` wants it."""

    def full(item):
        return {"text": item.get("text", ""), "image": item.get("image", b"")}

    return {
        "query": full(record["query"]),
        "positive": full(record["positive"]),
        "negatives": [full(item) for item in record.get("negatives", ())],
        "source": record["source"],
    }


def from_bytes(raw: bytes) -> dict:
    """One record from a serialized example: 20 µs, a tenth of the general TFDS parser's time."""
    feature = tf_example_pb2.Example.FromString(raw).features.feature

    def items(name):
        texts, images = feature[f"{name}/text"].bytes_list.value, feature[f"{name}/image"].bytes_list.value
        pairs = zip(texts, images, strict=True)
        return [({"text": text.decode()} if text else {}) | ({"image": image} if image else {}) for text, image in pairs]

    return {
        "query": items("query")[0],
        "positive": items("positive")[0],
        "negatives": items("negatives"),
        "source": feature["source"].bytes_list.value[0].decode(),
    }


class Records(Sequence):
    """Random access to one prepared split: `records[i]` is record i.

    Attributes:
      about: the source's marker.
      folder, split: where it is stored.
    """

    def __init__(self, builder_dir: str | Path, split: str, about: dict):
        self.about, self.folder, self.split = about, Path(builder_dir), split
        builder = tfds.builder_from_directory(str(builder_dir))
        # array_record refuses to open no files, which are those of an empty split.
        is_empty = not builder.info.splits[split].num_examples
        self.raw = () if is_empty else builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
        self._descriptions = None

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict:
        return from_bytes(self.raw[self._row(index)])

    @property
    def stored(self) -> "Records":
        """The records whose descriptions are the same in every epoch and step: these."""
        return self

    def described(self, row: int, epoch: int = 0, step: int = 0) -> dict:
        """The record with (width, height) in place of each image, the same in every epoch and step.

        After `with_descriptions` no record is read for it, unless the folder could not be written.
        """
        if self._descriptions is None:
            return described.describe(self[row], f"{self.folder}, {self.split}, row {row}")
        return self._descriptions[self._row(row)]

    def with_descriptions(self) -> "Records":
        """Returns the records; their descriptions are written first where they are missing, which reads all records once.

        Raises:
          UserError: an image cannot be read, or the disk is full.
        """
        split = described.Undescribed(self.raw, from_bytes, self.folder.parent.name)
        self._descriptions = described.open_or_add(split, described.file_of(self.folder, self.split))
        return self

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")  # what ends a loop over a sequence
        return index % len(self)


def write(builder: tfds.core.DatasetBuilder) -> None:
    """Writes all of a builder's splits into its folder, in place of what an earlier, killed preparation may have left there."""
    directory = Path(builder.data_dir)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for rest in (directory, *directory.parent.glob(f"incomplete.*_{directory.name}")):
        shutil.rmtree(rest, ignore_errors=True)
    tfds.disable_progress_bar()
    downloads = directory.parent / f"incomplete.downloads_{directory.name}"  # made by TFDS although nothing is downloaded
    with contextlib.redirect_stdout(io.StringIO()):  # its announcements; ours say what was prepared
        builder.download_and_prepare(download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)


def read_marker(source_dir: str | Path, version: str) -> dict | None:
    """What `write_marker` left, or None where this version of the source is not (completely) prepared."""
    path = Path(source_dir) / version / MARKER
    return json.loads(path.read_text()) if path.is_file() else None


def write_marker(source_dir: str | Path, marker: dict) -> None:
    """Declares a version of a source complete, atomically. marker: what is to be known of it, "version" among it."""
    path = Path(source_dir) / marker["version"] / MARKER
    write_json(path, marker)


def open_splits(source_dir: str | Path, version: str) -> list[Records]:
    """The records of all splits of a prepared source, with their descriptions.

    Raises:
      UserError: as `open_split` and `Records.with_descriptions`.
    """
    splits = tfds.builder_from_directory(str(Path(source_dir) / version)).info.splits
    return [open_split(source_dir, version, split).with_descriptions() for split in splits]


def open_split(source_dir: str | Path, version: str, split: str) -> Records:
    """The records of a prepared split.

    Raises:
      UserError: the source is not (completely) prepared; says how to.
    """
    source_dir = Path(source_dir)
    marker = read_marker(source_dir, version)
    if marker is None:
        raise UserError(
            f"{source_dir} holds no complete preparation (version {version}): "
            f"run `python -m metaembed_jax prepare --source={source_dir.name} --out={source_dir.parent}`"
        )
    return Records(source_dir / version, split, marker)


class Retrieval(NamedTuple):
    """A search task: every query's relevant documents, as sets of their indices."""

    queries: list[dict]
    documents: list[dict]
    relevance: list[set[int]]


def pairs_retrieval(pairs: Sequence[dict]) -> Retrieval:
    """Pairs as a search task: every query looks for its positive among all of them, equal ones being one document."""
    numbers, documents, relevance = {}, [], []
    for record in pairs:
        positive = record["positive"]
        key = positive.get("text"), positive.get("image")
        if key not in numbers:
            numbers[key] = len(documents)
            documents.append(positive)
        relevance.append({numbers[key]})
    return Retrieval([record["query"] for record in pairs], documents, relevance)
