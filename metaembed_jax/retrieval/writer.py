"""Writes segments: of new items, of those that others leave, and copies."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from metaembed_jax.errors import UserError
from metaembed_jax.files import sync_folder
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval.checked import CheckedWriter
from metaembed_jax.retrieval.items import Items, hashes, to_int8
from metaembed_jax.retrieval.manifest import Manifest
from metaembed_jax.retrieval.segment import CHECKSUMS, SegmentFiles, layout_of

COPIED_BYTES = 16 * 2**20  # that are held at once where segments are merged or copied


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
        self._layout = layout_of(manifest)
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
        write_checksums(self.folder, crcs)
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


def written(folder: Path, manifest: Manifest, first: Items, rest: Iterable[Items]) -> manifests.Segment:
    """A new segment of blocks of items, in the folder of an index.

    Raises:
      UserError: as `SegmentWriter`.
    """
    writer = SegmentWriter(folder, manifest)
    writer.add(first)
    del first
    for items in rest:
        if items.ids:
            writer.add(items)
    return writer.close()


def merged(folder: Path, manifest: Manifest, segments: Sequence[SegmentFiles]) -> tuple[manifests.Segment, ...]:
    """All items that are not deleted in one new segment; in none if there are none.

    Raises:
      UserError: a file is damaged, or an id is there twice.
    """
    writer = SegmentWriter(folder, manifest)
    at_once = max(COPIED_BYTES // (4 * manifest.levels[-1] * manifest.width), 1)
    for segment in segments:
        for block in segment.items(at_once):
            writer.write(*block)
    return (writer.close(),) if writer.items else ()


def copied(folder: Path, segment: SegmentFiles) -> manifests.Segment:
    """A copy of a segment in the folder of another index, checked on the way.

    Raises:
      UserError: a file is damaged.
    """
    about = dataclasses.replace(segment.about, name=new_name())
    target = folder / about.name
    target.mkdir()
    for name, file in segment.files.items():
        writer, at_once = CheckedWriter(target / name), max(COPIED_BYTES // file.row_bytes, 1)
        for start in range(0, len(file), at_once):
            writer.write(file.read(start, min(start + at_once, len(file))))
            file.release()
        writer.close()
    write_checksums(target, segment.checksums)
    return about


def new_name() -> str:
    """Of a segment: no other one has it."""
    return os.urandom(8).hex()


def write_checksums(folder: Path, content: bytes) -> None:
    """Finishes a segment; its folder is on the disk when this returns."""
    writer = CheckedWriter(folder / CHECKSUMS)
    writer.write(content)
    writer.close()
    sync_folder(folder)
