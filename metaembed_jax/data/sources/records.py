"""The record of every source, on disk and in memory.

    item   = {"text": str (optional), "image": encoded bytes (optional)}
    record = {"query": item, "positive": item, "negatives": [item, ...], "source": str,
              "teacher_scores": [float, ...], "labels": [float, ...]}      of positive and negatives (optional): see `candidates`

On disk a record is a `tf.Example` in ArrayRecord, written by TensorFlow Datasets (TensorFlow itself is never imported). An absent
text or image is the empty string there, and absent scores or labels are empty lists. Images stay encoded until a batch needs them;
`descriptions` has their sizes.
"""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from metaembed_jax.data.sources import descriptions
from metaembed_jax.data.sources.candidates import NUMBERS, further_positives
from metaembed_jax.errors import UserError
from metaembed_jax.files import read_json, write_json

SPLITS = ("train", "validation", "test")
HELD_OUT_SPLITS = SPLITS[1:]
MARKER = "prepared.json"  # written last: a source that has it is complete


def features() -> tfds.features.FeaturesDict:
    """Return the schema of records. An image is a `Tensor` of bytes, because TFDS would decode an `Image` on reading."""

    def item():
        return {"text": tfds.features.Text(), "image": tfds.features.Tensor(shape=(), dtype=np.object_)}

    numbers = {name: tfds.features.Sequence(np.float32) for name in NUMBERS}
    items = {"query": item(), "positive": item(), "negatives": tfds.features.Sequence(item())}
    return tfds.features.FeaturesDict({**items, "source": tfds.features.Text(), **numbers})


def to_example(record: dict) -> dict:
    """Return a record with every field of `features`."""

    def full(item):
        return {"text": item.get("text", ""), "image": item.get("image", b"")}

    return {
        "query": full(record["query"]),
        "positive": full(record["positive"]),
        "negatives": [full(item) for item in record.get("negatives", ())],
        "source": record["source"],
        **{name: record.get(name, ()) for name in NUMBERS},
    }


def from_bytes(serialized: bytes) -> dict:
    """Return the record of a serialized `tf.Example`, in 20 µs, a tenth of the time of TFDS's general parser."""
    feature = tf_example_pb2.Example.FromString(serialized).features.feature  # pyright: ignore[reportAttributeAccessIssue]

    def items(name):
        texts, images = feature[f"{name}/text"].bytes_list.value, feature[f"{name}/image"].bytes_list.value
        pairs = zip(texts, images, strict=True)
        return [({"text": text.decode()} if text else {}) | ({"image": image} if image else {}) for text, image in pairs]

    return {
        "query": items("query")[0],
        "positive": items("positive")[0],
        "negatives": items("negatives"),
        "source": feature["source"].bytes_list.value[0].decode(),
        **{name: list(numbers) for name in NUMBERS if (numbers := feature[name].float_list.value)},
    }


class Records(Sequence[dict]):
    """The records of a prepared split, with random access.

    Attributes:
      marker: that of the source.
      folder, split: where the records are stored.
    """

    def __init__(self, folder: str | Path, split: str, marker: dict):
        self.marker, self.folder, self.split = marker, Path(folder), split
        builder = tfds.builder_from_directory(str(folder))
        self._serialized = ()
        if builder.info.splits[split].num_examples:  # array_record does not open the empty list of files of an empty split
            raw = DeserializeMethod.RAW_BYTES
            self._serialized = builder.as_data_source(split, deserialize_method=raw)  # pyright: ignore[reportCallIssue] (decorated)
        self._descriptions = None

    def __len__(self) -> int:
        return len(self._serialized)

    def __getitem__(self, index: int) -> dict:
        return from_bytes(self._serialized[self._row(index)])

    @property
    def stored(self) -> "Records":
        """These records, whose descriptions are the same in every epoch and step."""
        return self

    def describe(self, row: int, epoch: int = 0, step: int = 0) -> dict:
        """Return the description of a record.

        After `with_descriptions` the record is not read for it, unless the folder cannot be written.
        """
        if self._descriptions is None:
            return descriptions.describe(self[row], f"{self.folder}, {self.split}, row {row}")
        return self._descriptions[self._row(row)]

    def with_descriptions(self) -> "Records":
        """Return these records with their descriptions. If those are missing, all records are read once to write them.

        Raises:
          UserError: an image cannot be read, or the disk is full.
        """
        split = descriptions.StoredSplit(self._serialized, from_bytes, self.folder.parent.name)
        self._descriptions = descriptions.open_or_write(split, descriptions.file_of(self.folder, self.split))
        return self

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")  # a loop over a sequence ends by it
        return index % len(self)


def write(builder: tfds.core.DatasetBuilder) -> None:
    """Write all splits of a builder into its folder, and remove the files of a preparation that was killed."""
    directory = Path(builder.data_dir)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in (directory, *directory.parent.glob(f"incomplete.*_{directory.name}")):
        shutil.rmtree(unfinished, ignore_errors=True)
    tfds.disable_progress_bar()
    downloads = directory.parent / f"incomplete.downloads_{directory.name}"  # TFDS makes it although nothing is downloaded
    with contextlib.redirect_stdout(io.StringIO()):  # its messages; the source prints its own
        builder.download_and_prepare(download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)


def fingerprint(contents: Iterable[tuple[str, bytes]]) -> str:
    """Return 16 hexadecimal digits of (text, image) of each record of a generated source."""
    digest = hashlib.sha256()
    for text, image in contents:
        digest.update(text.encode() + b"\0" + hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]


def read_marker(source_dir: str | Path, version: str) -> dict | None:
    """Return the marker of a source; None if this version is not completely prepared, or its marker is damaged."""
    with contextlib.suppress(UserError):
        marker = read_json(Path(source_dir) / version / MARKER)
        if marker.get("version") == version:
            return marker
    return None


def write_marker(source_dir: str | Path, marker: dict) -> None:
    """Write the marker of a complete source, atomically, into the folder of its "version"."""
    write_json(Path(source_dir) / marker["version"] / MARKER, marker)


def open_splits(source_dir: str | Path, version: str) -> list[Records]:
    """Open all splits of a prepared source, with their descriptions.

    Raises:
      UserError: as `open_split` and `Records.with_descriptions`.
    """
    splits = tfds.builder_from_directory(str(Path(source_dir) / version)).info.splits
    return [open_split(source_dir, version, split).with_descriptions() for split in splits]


def open_split(source_dir: str | Path, version: str, split: str) -> Records:
    """Open a split of a prepared source.

    Raises:
      UserError: the source is not completely prepared; names the command that prepares it.
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
    """A search task.

    Attributes:
      relevance: the indices of each query's relevant documents.
    """

    queries: list[dict]
    documents: list[dict]
    relevance: list[set[int]]


def pairs_retrieval(pairs: Sequence[dict]) -> Retrieval:
    """Return pairs as a search task: each query searches its positives among all positives. Equal items are one."""
    query_numbers, document_numbers, queries, documents, relevance = {}, {}, [], [], []
    for record in pairs:
        query, positive = record["query"], record["positive"]
        number = query_numbers.setdefault(_key(query), len(queries))
        if number == len(queries):
            queries.append(query)
            relevance.append(set())
        for item in (positive, *further_positives(record)):
            document = document_numbers.setdefault(_key(item), len(documents))
            if document == len(documents):
                documents.append(item)
            relevance[number].add(document)
    return Retrieval(queries, documents, relevance)


def _key(item: dict) -> tuple[str | None, bytes | None]:
    return item.get("text"), item.get("image")
