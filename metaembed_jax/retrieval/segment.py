"""A segment of an index: a folder of files that are written once and then only read.

vectors-0-1, vectors-1-4, ...    [items, vectors of the level, D]: a file for each level, so that a search at a small budget
                                 reads only its levels
scales-0-1, ...                  float32 [items, vectors of the level], for int8
exact-0-1, ...                   [items, vectors of the level, D]: the vectors before the rounding to int8, if they are kept
errors-0-1, ...                  float16 [items, vectors of the level]: `ingest.rounding_errors` of these
counts                           int32 [items]: vectors of each item
ids, id-ends, id-hashes          concatenated texts; int64 and uint64 [items]: the end and the hash of each text
stamps                           uint64 [items]: `Documents.stamps`, or zeros
metadata, metadata-ends          concatenated JSON objects; int64 [items]: the end of each
columns, column-index            the values of the metadata by key: `columns`
checksums                        CRC-32 of each `checksummed_files.CHUNK_BYTES` bytes of all files above, in order of their names
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, Int

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval.checksummed_files import ChecksummedFile, count_chunks, map_file
from metaembed_jax.retrieval.columns import Columns, parse_metadata
from metaembed_jax.retrieval.ingest import hashes
from metaembed_jax.retrieval.manifest import Manifest

CHECKSUMS = "checksums"
READ_ITEMS = 2**16  # items whose errors are read at once
BLOBS = ("ids", "metadata", "columns", "column-index")  # files of any size
TEXT_FILES = (*BLOBS, "id-ends", "id-hashes", "metadata-ends")  # made of the ids and metadata of items


class SegmentFiles:
    """The open files of a segment.

    Args:
      folder: the folder of the index.
      manifest: the manifest of the index.
      entry: the segment's entry in the manifest.

    Attributes:
      files: all files except the checksums, by name.
      checksums: the content of the file `checksums`.
      levels: the file of vectors of each level.
      scales: the file of scales of each level; empty unless the index is int8.
      exact: the file of exact vectors of each level: those of `levels` unless the index is int8; empty if it has none.
      errors: the file of rounding errors of each level; empty unless an int8 index has exact vectors.
      counts: the file of the number of vectors of each item.
      columns: the values of the metadata by key.

    Raises:
      UserError: a file has another size than in the manifest, or the checksums are damaged.
      FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path, manifest: Manifest, entry: manifests.Segment):
        self.entry, self.folder = entry, folder / entry.name
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link; expected a folder in the index")
        layout = layout_of(manifest)
        if entry.sizes.keys() != layout.keys():
            raise UserError(f"{folder}: the manifest names other files of {entry.name} than a segment has; build the index again")
        self.checksums, self.files = _read_checksums(self.folder, entry), {}
        crcs = np.frombuffer(self.checksums, np.uint32)
        for name in sorted(layout):
            dtype, row = layout[name]
            expected = entry.items * np.dtype(dtype).itemsize * int(np.prod(row))
            if name not in BLOBS and entry.sizes[name] != expected:
                raise UserError(f"{folder}: the manifest gives {name} another size than its items have; build the index again")
            crcs_of_file, crcs = np.split(crcs, [count_chunks(entry.sizes[name])])
            self.files[name] = ChecksummedFile(self.folder / name, crcs_of_file, entry.sizes[name], dtype, row)
        names = manifests.level_names(manifest)

        def by_level(kind: str) -> list[ChecksummedFile]:
            return [self.files[f"{kind}-{name}"] for name in names if f"{kind}-{name}" in self.files]

        self.levels, self.scales, self.errors = by_level("vectors"), by_level("scales"), by_level("errors")
        self.exact = by_level("exact") if manifest.dtype == "int8" else self.levels
        self.counts = self.files["counts"]
        self._largest_errors = 0, np.zeros(0, np.float16)  # of a number of vectors
        self.columns = Columns(self.files["columns"], self.files["column-index"], entry.items)

    def __len__(self) -> int:
        return self.entry.items

    @functools.cached_property
    def is_alive(self) -> Bool[np.ndarray, " N"]:
        """Mask of the items that are not deleted."""
        alive = np.ones(len(self), bool)
        alive[list(self.entry.deleted)] = False
        return alive

    def ids(self, rows: Iterable[int]) -> list[str]:
        """Return the ids of rows."""
        return [self._text("ids", "id-ends", int(row)) for row in rows]

    def metadata(self, row: int) -> dict:
        """Return the metadata of an item."""
        return parse_metadata(self._text("metadata", "metadata-ends", row), f"{self.folder / 'metadata'}, item {row}")

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the row of each id that the segment has and that is not deleted."""
        hashes_n, stored = hashes(ids), self.files["id-hashes"].read(0, len(self))
        first_n, last_n = (np.searchsorted(stored, hashes_n, side, self._order) for side in ("left", "right"))
        rows = {}
        for number in np.flatnonzero(last_n > first_n).tolist():
            for row in self._order[first_n[number] : last_n[number]].tolist():  # several if their ids have the same hash
                if self.is_alive[row] and self.ids([row]) == [ids[number]]:
                    rows[ids[number]] = row
        return rows

    @functools.cached_property
    def _order(self) -> Int[np.ndarray, " N"]:
        """Rows in the order of the hashes of their ids."""
        return np.argsort(self.files["id-hashes"].read(0, len(self)))

    def largest_errors(self, vectors: int) -> Float16[np.ndarray, " N"]:
        """Return the largest rounding error among the first vectors of each item; zeros without files of errors.

        The last result is kept, because every certified search needs it.
        """
        if self._largest_errors[0] != vectors:
            errors_N, first = np.zeros(len(self), np.float16), 0
            for file in self.errors:
                for start in range(0, len(self) if first < vectors else 0, READ_ITEMS):
                    rows = errors_N[start : start + READ_ITEMS]
                    level_nw = file.read(start, start + len(rows))
                    np.maximum(rows, level_nw[:, : vectors - first].max(1), out=rows)
                    file.release()
                first += file.read(0, 0).shape[1]
            self._largest_errors = vectors, errors_N
        return self._largest_errors[1]

    def check_all(self) -> None:
        """Read and check every file.

        Raises:
          UserError: a file is damaged.
        """
        with ThreadPoolExecutor() as threads:  # checksums are computed without Python's lock
            list(threads.map(lambda file: (file.check_all(), file.release()), self.files.values()))

    def release(self) -> None:
        """Release the memory that the files fill."""
        for file in self.files.values():
            file.release()

    def items(self, at_once: int) -> Iterator[tuple[list[str], list[str], dict[str, np.ndarray]]]:
        """Yield the items that are not deleted, in blocks of `at_once` rows, as the arguments of `SegmentWriter.write`."""
        names = [name for name in self.files if name not in TEXT_FILES]
        for start in range(0, len(self), at_once):
            rows = start + np.flatnonzero(self.is_alive[start : start + at_once])
            texts = [self._text("metadata", "metadata-ends", row) for row in rows.tolist()]
            arrays = {name: self.files[name].take(rows) for name in names}
            if (arrays["counts"] < self.entry.fewest).any():
                raise UserError(
                    f"{self.folder / 'counts'}: an item has fewer vectors than the manifest says; build the index again"
                )
            yield self.ids(rows), texts, arrays
            self.release()

    def _text(self, blob: str, ends: str, row: int) -> str:
        bounds = self.files[ends].read(max(row - 1, 0), row + 1)
        start, end = (0 if row == 0 else int(bounds[0])), int(bounds[-1])
        if not 0 <= start <= end <= len(self.files[blob]):
            raise UserError(f"{self.folder / ends}: item {row} ends outside of its file; build the index again")
        try:
            return self.files[blob].read(start, end).tobytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.folder / blob}: expected UTF-8 text of item {row}; build the index again") from error


def count_items(segments: Iterable[SegmentFiles]) -> int:
    """Return the number of items of segments that are not deleted."""
    return sum(len(segment) - len(segment.entry.deleted) for segment in segments)


def layout_of(manifest: Manifest) -> dict[str, tuple]:
    """Return the dtype and the shape of a row of each file of a segment."""
    layout: dict[str, tuple] = {
        **dict.fromkeys(BLOBS, (np.uint8, ())),
        "id-ends": (np.int64, ()),
        "metadata-ends": (np.int64, ()),
        "id-hashes": (np.uint64, ()),
        "stamps": (np.uint64, ()),
        "counts": (np.int32, ()),
    }
    ends = manifest.levels
    for name, start, end in zip(manifests.level_names(manifest), (0, *ends), ends, strict=False):
        layout[f"vectors-{name}"] = (np.dtype(manifest.dtype), (end - start, manifest.width))
        if manifest.dtype == "int8":
            layout[f"scales-{name}"] = (np.float32, (end - start,))
        if manifest.exact:
            layout[f"exact-{name}"] = (np.dtype(manifest.exact), (end - start, manifest.width))
            layout[f"errors-{name}"] = (np.float16, (end - start,))
    return layout


def _read_checksums(folder: Path, entry: manifests.Segment) -> bytes:
    path, chunks = folder / CHECKSUMS, sum(map(count_chunks, entry.sizes.values()))
    content = bytes(map_file(path, 4 * chunks))
    if hashlib.sha256(content).hexdigest() != entry.checksums:
        raise UserError(f"{path} is damaged: its checksum does not match; build the index again")
    return content
