"""A segment of an index: a folder of files that are written once and then only read.

vectors-0-1, vectors-1-4, ...    [items, vectors of the level, D]: the first vectors of all items lie together, so that a
                                 search by these reads nothing else
scales-0-1, ...                  float32 [items, vectors of the level], of int8
counts                           int32 [items]: how many vectors each has
ids, id-ends, id-hashes          texts end to end; int64 and uint64 [items]: where each ends, and a number to find it by
metadata, metadata-ends          JSON objects end to end, and where each ends
checksums                        CRC-32 of every `checked.PIECE` bytes of all files above, in the order of their names
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval.checked import CheckedFile, CheckedWriter, map_file, pieces
from metaembed_jax.retrieval.items import Items, hashes, to_int8
from metaembed_jax.retrieval.manifest import Manifest

CHECKSUMS = "checksums"
AT_ONCE = 16 * 2**20  # bytes that are copied at once


class SegmentFiles:
    """The files of a segment, opened.

    Args:
      folder: of the index.
      manifest: of the index.
      about: the segment's part of it.

    Attributes:
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
        layout = _layout(manifest)
        if about.sizes.keys() != layout.keys():
            raise UserError(f"{folder}: the manifest names other files in {about.name} than there are; build the index again")
        crcs, self._files = _read_checksums(self.folder, about), {}
        for name in sorted(layout):
            dtype, row = layout[name]
            fits = about.items * np.dtype(dtype).itemsize * int(np.prod(row))
            if name not in ("ids", "metadata") and about.sizes[name] != fits:
                raise UserError(f"{folder}: the manifest gives {name} another size than its items have; build the index again")
            mine, crcs = np.split(crcs, [pieces(about.sizes[name])])
            self._files[name] = CheckedFile(self.folder / name, mine, about.sizes[name], dtype, row)
        names = manifests.level_names(manifest)
        self.levels = [self._files[f"vectors-{name}"] for name in names]
        self.scales = [self._files[f"scales-{name}"] for name in names] if manifest.dtype == "int8" else []
        self.counts = self._files["counts"]

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
        try:
            return json.loads(self._text("metadata", "metadata-ends", row))
        except ValueError as error:
            raise UserError(f"{self.folder / 'metadata'}: item {row} has no JSON there; build the index again") from error

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """The rows of those ids that are here, and not deleted."""
        wanted: dict[int, list[str]] = {}
        for number, name in zip(hashes(ids).tolist(), ids, strict=True):
            wanted.setdefault(number, []).append(name)
        stored = self._files["id-hashes"].read(0, len(self))
        rows = np.flatnonzero(np.isin(stored, np.fromiter(wanted, np.uint64)) & self.is_alive)
        found = zip(self.ids(rows), stored[rows].tolist(), rows.tolist(), strict=True)
        return {name: row for name, number, row in found if name in wanted[number]}

    def check_all(self) -> None:
        """Reads every file.

        Raises:
          UserError: one is damaged.
        """
        for file in self._files.values():
            file.check_all()
            file.release()

    def release(self) -> None:
        """Gives the memory back that reading has filled."""
        for file in self._files.values():
            file.release()

    def items(self, at_once: int) -> Iterator[tuple[list[str], list[np.ndarray], list[np.ndarray], np.ndarray, list[str]]]:
        """What is not deleted, as `SegmentWriter.write` takes it, so many items at once."""
        for start in range(0, len(self), at_once):
            rows = start + np.flatnonzero(self.is_alive[start : start + at_once])
            levels, scales = ([file.take(rows) for file in files] for files in (self.levels, self.scales))
            texts = [self._text("metadata", "metadata-ends", row) for row in rows.tolist()]
            yield self.ids(rows), levels, scales, self.counts.take(rows), texts
            self.release()

    def copy(self, folder: Path) -> manifests.Segment:
        """Copies all files into the folder of another index; they are checked on the way. For that index's manifest.

        Raises:
          UserError: one is damaged.
        """
        about = dataclasses.replace(self.about, name=new_name())
        target = folder / about.name
        target.mkdir()
        for name, file in self._files.items():
            writer, at_once = CheckedWriter(target / name), max(AT_ONCE // file.row_bytes, 1)
            for start in range(0, len(file), at_once):
                writer.write(file.read(start, min(start + at_once, len(file))))
                file.release()
            writer.close()
        _write_checksums(target, bytes(map_file(self.folder / CHECKSUMS, 4 * sum(map(pieces, about.sizes.values())))))
        return about

    def _text(self, blob: str, ends: str, row: int) -> str:
        places = self._files[ends].read(max(row - 1, 0), row + 1)
        start, end = (0 if row == 0 else int(places[0])), int(places[-1])
        if not 0 <= start <= end <= len(self._files[blob]):
            raise UserError(f"{self.folder / ends}: item {row} lies outside of its file; build the index again")
        try:
            return self._files[blob].read(start, end).tobytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.folder / blob}: item {row} is no text; build the index again") from error


class SegmentWriter:
    """Writes a segment, a block of items after the other.

    Args:
      folder: of the index.
      manifest: of the index, for its width, levels and dtype.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.manifest, self.name, self.items, self.fewest = manifest, new_name(), 0, manifest.levels[-1]
        self.folder = folder / self.name
        self.folder.mkdir()
        self._layout = _layout(manifest)
        self._files = {name: CheckedWriter(self.folder / name) for name in self._layout}
        self._hashes: list[np.ndarray] = []

    def add(self, items: Items) -> None:
        """Appends items; of each, the vectors that the index keeps.

        Raises:
          UserError: vectors of another width.
        """
        ends, (_, most, width) = self.manifest.levels, items.vectors_NRD.shape
        if width != self.manifest.width:
            raise UserError(
                f"the vectors of item {items.ids[0]!r} have width {width}, and those of the index {self.manifest.width}"
            )
        if most > ends[-1]:
            name = items.ids[int(items.counts_N.argmax())]
            raise UserError(f"item {name!r} has {most} vectors, and the index keeps {ends[-1]}; say with budget= how many to keep")
        levels, scales = [], []
        for start, end in zip((0, *ends), ends, strict=False):
            level_NwD = items.vectors_NRD[:, start:end]
            level_NwD = np.pad(level_NwD, [(0, 0), (0, end - start - level_NwD.shape[1]), (0, 0)])
            if self.manifest.dtype == "int8":
                level_NwD, scale_Nw = to_int8(level_NwD)
                scales.append(scale_Nw)
            levels.append(level_NwD)
        self.write(items.ids, levels, scales, items.counts_N, items.metadata)

    def write(self, ids, levels, scales, counts, metadata) -> None:
        """Appends items whose vectors are in levels, and in the index's dtype, already."""
        if not ids:
            return
        names = manifests.level_names(self.manifest)
        arrays = {f"vectors-{name}": level for name, level in zip(names, levels, strict=True)}
        arrays |= {f"scales-{name}": scale for name, scale in zip(names, scales, strict=False)}
        self._hashes.append(hashes(ids))
        arrays |= {"counts": counts, "id-hashes": self._hashes[-1]}
        for name, array in arrays.items():
            self._files[name].write(np.asarray(array, self._layout[name][0]))
        for blob, ends, texts in (("ids", "id-ends", ids), ("metadata", "metadata-ends", metadata)):
            encoded = [text.encode() for text in texts]
            before = self._files[blob].size
            self._files[ends].write(before + np.cumsum([len(one) for one in encoded], dtype=np.int64))
            self._files[blob].write(b"".join(encoded))
        self.items += len(ids)
        self.fewest = min(self.fewest, int(counts.min()))

    def close(self) -> manifests.Segment:
        """Finishes the files; all is on the disk when this returns. For the index's manifest.

        Raises:
          UserError: an id is there twice.
        """
        for file in self._files.values():
            file.close()
        crcs = np.array([crc for name in sorted(self._files) for crc in self._files[name].crcs], np.uint32).tobytes()
        _write_checksums(self.folder, crcs)
        sizes = {name: file.size for name, file in self._files.items()}
        about = manifests.Segment(self.name, self.items, self.fewest, sizes, hashlib.sha256(crcs).hexdigest())
        self._refuse_doubles(about)
        return about

    def _refuse_doubles(self, about: manifests.Segment) -> None:
        numbers = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        order = np.argsort(numbers, kind="stable")
        same = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
        if len(same):
            files = SegmentFiles(self.folder.parent, self.manifest, about)
            for first, second in itertools.pairwise(files.ids(order[np.union1d(same, same + 1)])):
                if first == second:
                    raise UserError(f"the id {first!r} is there twice; ids name one item each")


def new_name() -> str:
    """Of a segment: no other one has it."""
    return os.urandom(8).hex()


def sync(folder: Path) -> None:
    """What was renamed or made in a folder stays so, even if the machine stops now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _layout(manifest: Manifest) -> dict[str, tuple]:
    """{file: (dtype, shape of a row)}."""
    layout = {name: (np.uint8, ()) for name in ("ids", "metadata")}
    layout |= {name: (np.int64, ()) for name in ("id-ends", "metadata-ends")}
    layout |= {"id-hashes": (np.uint64, ()), "counts": (np.int32, ())}
    ends = manifest.levels
    for name, start, end in zip(manifests.level_names(manifest), (0, *ends), ends, strict=False):
        layout[f"vectors-{name}"] = (np.dtype(manifest.dtype), (end - start, manifest.width))
        if manifest.dtype == "int8":
            layout[f"scales-{name}"] = (np.float32, (end - start,))
    return layout


def _read_checksums(folder: Path, about: manifests.Segment) -> np.ndarray:
    path, wanted = folder / CHECKSUMS, sum(map(pieces, about.sizes.values()))
    content = bytes(map_file(path, 4 * wanted))
    if hashlib.sha256(content).hexdigest() != about.checksums:
        raise UserError(f"{path} is damaged: its checksum does not fit; build the index again")
    return np.frombuffer(content, np.uint32)


def _write_checksums(folder: Path, content: bytes) -> None:
    writer = CheckedWriter(folder / CHECKSUMS)
    writer.write(content)
    writer.close()
    sync(folder)
