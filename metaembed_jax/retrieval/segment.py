"""A segment of an index: a folder of files that are written once and then only read.

vectors-0-1, vectors-1-4, ...    [items, vectors of the level, D]: the first vectors of all items lie together, so that a
                                 search by these reads nothing else
scales-0-1, ...                  float32 [items, vectors of the level], of int8
counts                           int32 [items]: how many vectors each has
ids, id-ends, id-hashes          texts end to end; int64 and uint64 [items]: where each ends, and a number to find it by
metadata, metadata-ends          JSON objects end to end, and where each ends
checksums                        CRC-32 of every `checked.PIECE` bytes of all files above, in the order of their names
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval.checked import CheckedFile, map_file, pieces
from metaembed_jax.retrieval.items import hashes
from metaembed_jax.retrieval.manifest import Manifest

CHECKSUMS = "checksums"


class SegmentFiles:
    """The files of a segment, opened.

    Args:
      folder: of the index.
      manifest: of the index.
      about: the segment's part of it.

    Attributes:
      files: all but the checksums, a `CheckedFile` each, by name.
      checksums: the content of that file.
      levels, scales: a `CheckedFile` for each level; no scales unless the index is int8.
      counts: of int32.

    Raises:
      UserError: a file has another size than it should, or the checksums are damaged.
      FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path, manifest: Manifest, about: manifests.Segment):
        self.about, self.folder = about, folder / about.name
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link; an index lies in its own folder")
        layout = layout_of(manifest)
        if about.sizes.keys() != layout.keys():
            raise UserError(f"{folder}: the manifest names other files in {about.name} than there are; build the index again")
        self.checksums, self.files = _read_checksums(self.folder, about), {}
        crcs = np.frombuffer(self.checksums, np.uint32)
        for name in sorted(layout):
            dtype, row = layout[name]
            fits = about.items * np.dtype(dtype).itemsize * int(np.prod(row))
            if name not in ("ids", "metadata") and about.sizes[name] != fits:
                raise UserError(f"{folder}: the manifest gives {name} another size than its items have; build the index again")
            mine, crcs = np.split(crcs, [pieces(about.sizes[name])])
            self.files[name] = CheckedFile(self.folder / name, mine, about.sizes[name], dtype, row)
        names = manifests.level_names(manifest)
        self.levels = [self.files[f"vectors-{name}"] for name in names]
        self.scales = [self.files[f"scales-{name}"] for name in names] if manifest.dtype == "int8" else []
        self.counts = self.files["counts"]

    def __len__(self) -> int:
        return self.about.items

    @functools.cached_property
    def is_alive(self) -> Bool[np.ndarray, " N"]:
        """Which items are not deleted."""
        alive = np.ones(len(self), bool)
        alive[list(self.about.deleted)] = False
        return alive

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The ids of some rows."""
        return [self._text("ids", "id-ends", int(row)) for row in rows]

    def metadata(self, row: int) -> dict:
        """What is known of an item."""
        text = self._text("metadata", "metadata-ends", row)
        try:
            about = json.loads(text)
        except (ValueError, RecursionError):
            about = None
        if not isinstance(about, dict):
            raise UserError(f"{self.folder / 'metadata'}: item {row} has no JSON object there; build the index again")
        return about

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """The rows of those ids that are here, and not deleted."""
        wanted: dict[int, list[str]] = {}
        for number, name in zip(hashes(ids).tolist(), ids, strict=True):
            wanted.setdefault(number, []).append(name)
        stored = self.files["id-hashes"].read(0, len(self))
        rows = np.flatnonzero(np.isin(stored, np.fromiter(wanted, np.uint64)) & self.is_alive)
        found = zip(self.ids(rows), stored[rows].tolist(), rows.tolist(), strict=True)
        return {name: row for name, number, row in found if name in wanted[number]}

    def check_all(self) -> None:
        """Reads every file.

        Raises:
          UserError: one is damaged.
        """
        for file in self.files.values():
            file.check_all()
            file.release()

    def release(self) -> None:
        """Gives the memory back that reading has filled."""
        for file in self.files.values():
            file.release()

    def items(self, at_once: int) -> Iterator[tuple[list[str], list[np.ndarray], list[np.ndarray], np.ndarray, list[str]]]:
        """What is not deleted, as `SegmentWriter.write` takes it, so many items at once."""
        for start in range(0, len(self), at_once):
            rows = start + np.flatnonzero(self.is_alive[start : start + at_once])
            levels, scales = ([file.take(rows) for file in files] for files in (self.levels, self.scales))
            texts = [self._text("metadata", "metadata-ends", row) for row in rows.tolist()]
            counts = self.counts.take(rows)
            if (counts < self.about.fewest).any():
                raise UserError(
                    f"{self.folder / 'counts'}: an item has fewer vectors than the manifest says; build the index again"
                )
            yield self.ids(rows), levels, scales, counts, texts
            self.release()

    def _text(self, blob: str, ends: str, row: int) -> str:
        places = self.files[ends].read(max(row - 1, 0), row + 1)
        start, end = (0 if row == 0 else int(places[0])), int(places[-1])
        if not 0 <= start <= end <= len(self.files[blob]):
            raise UserError(f"{self.folder / ends}: item {row} lies outside of its file; build the index again")
        try:
            return self.files[blob].read(start, end).tobytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.folder / blob}: item {row} is no text; build the index again") from error


def layout_of(manifest: Manifest) -> dict[str, tuple]:
    """{file: (dtype, shape of a row)}."""
    layout = dict.fromkeys(("ids", "metadata"), (np.uint8, ()))
    layout |= dict.fromkeys(("id-ends", "metadata-ends"), (np.int64, ()))
    layout |= {"id-hashes": (np.uint64, ()), "counts": (np.int32, ())}
    ends = manifest.levels
    for name, start, end in zip(manifests.level_names(manifest), (0, *ends), ends, strict=False):
        layout[f"vectors-{name}"] = (np.dtype(manifest.dtype), (end - start, manifest.width))
        if manifest.dtype == "int8":
            layout[f"scales-{name}"] = (np.float32, (end - start,))
    return layout


def _read_checksums(folder: Path, about: manifests.Segment) -> bytes:
    path, wanted = folder / CHECKSUMS, sum(map(pieces, about.sizes.values()))
    content = bytes(map_file(path, 4 * wanted))
    if hashlib.sha256(content).hexdigest() != about.checksums:
        raise UserError(f"{path} is damaged: its checksum does not fit; build the index again")
    return content
