"""Write segments: from new items, by merging segments, and by copying one."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt64

from metaembed_jax.errors import UserError
from metaembed_jax.files import sync_folder
from metaembed_jax.retrieval import manifest as manifests
from metaembed_jax.retrieval.checksummed_files import ChecksummedWriter
from metaembed_jax.retrieval.columns import ColumnWriter
from metaembed_jax.retrieval.ingest import Items, hashes, rounding_errors, to_int8
from metaembed_jax.retrieval.manifest import Manifest
from metaembed_jax.retrieval.segment import CHECKSUMS, SegmentFiles, layout_of

COPIED_BYTES = 16 * 2**20  # in memory at once, while segments are merged or copied


class SegmentWriter:
    """A segment that is written block by block.

    Args:
      folder: the folder of the index.
      manifest: the manifest of the index, which has its width, levels and types.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.manifest, self.name = manifest, new_name()
        self.folder = folder / self.name
        self.folder.mkdir()
        self._layout = layout_of(manifest)
        self._files = {name: ChecksummedWriter(self.folder / name) for name in self._layout}
        self._columns = ColumnWriter(self._files["columns"])
        self._hashes: list[np.ndarray] = []
        self.item_count, self.fewest_vectors = 0, manifest.levels[-1]

    def add(self, items: Items, stamps_N: UInt64[np.ndarray, " N"] | None = None) -> None:
        """Append items.

        Args:
          stamps_N: stamps of documents; zeros by default.

        Raises:
          UserError: the vectors do not have the width of the index, or an item has more vectors than it stores.
        """
        ends, (_, vectors, width) = self.manifest.levels, items.vectors_NRD.shape
        if width != self.manifest.width:
            raise UserError(
                f"the vectors of item {items.ids[0]!r} have width {width}; expected {self.manifest.width}, the width of the index"
            )
        if vectors > ends[-1]:
            item = items.ids[int(items.counts_N.argmax())]
            raise UserError(f"item {item!r} has {vectors} vectors; expected at most {ends[-1]}; set budget= to keep fewer")
        stamps_N = np.zeros(len(items.ids), np.uint64) if stamps_N is None else stamps_N
        arrays = {"counts": items.counts_N, "stamps": stamps_N}
        for name, start, end in zip(manifests.level_names(self.manifest), (0, *ends), ends, strict=False):
            level_NwD = items.vectors_NRD[:, start:end]
            level_NwD = np.pad(level_NwD, [(0, 0), (0, end - start - level_NwD.shape[1]), (0, 0)])
            arrays |= {f"{kind}-{name}": array for kind, array in self._as_stored(level_NwD).items()}
        self.write(items.ids, items.metadata, arrays)

    def _as_stored(self, level_NwD: Float[np.ndarray, "N w D"]) -> dict[str, np.ndarray]:
        """Return the arrays of a level, by the kind of their file."""
        if self.manifest.dtype != "int8":
            return {"vectors": level_NwD}
        numbers_NwD, scales_Nw = to_int8(level_NwD)
        arrays = {"vectors": numbers_NwD, "scales": scales_Nw}
        if self.manifest.exact:
            exact_NwD = level_NwD.astype(self.manifest.exact)
            arrays |= {"exact": exact_NwD, "errors": rounding_errors(exact_NwD, numbers_NwD, scales_Nw)}
        return arrays

    def write(self, ids: list[str], metadata: list[str], arrays: dict[str, np.ndarray]) -> None:
        """Append items, with the arrays of all files that do not hold texts."""
        if not ids:
            return
        self._hashes.append(hashes(ids))
        for name, array in (arrays | {"id-hashes": self._hashes[-1]}).items():
            self._files[name].write(np.asarray(array, self._layout[name][0]))
        for blob, ends, texts in (("ids", "id-ends", ids), ("metadata", "metadata-ends", metadata)):
            encoded = [text.encode() for text in texts]
            size = self._files[blob].size
            self._files[ends].write(size + np.cumsum([len(text) for text in encoded], dtype=np.int64))
            self._files[blob].write(b"".join(encoded))
        self._columns.add(metadata)
        self.item_count += len(ids)
        self.fewest_vectors = min(self.fewest_vectors, int(arrays["counts"].min()))

    def close(self) -> manifests.Segment:
        """Close all files, and return the segment's entry for the manifest. The segment is on the disk when this returns.

        Raises:
          UserError: two items have the same id.
        """
        self._files["column-index"].write(self._columns.close())
        for file in self._files.values():
            file.close()
        crcs = np.array([crc for name in sorted(self._files) for crc in self._files[name].crcs], np.uint32).tobytes()
        write_checksums(self.folder, crcs)
        sizes = {name: file.size for name, file in self._files.items()}
        entry = manifests.Segment(self.name, self.item_count, self.fewest_vectors, sizes, hashlib.sha256(crcs).hexdigest())
        self._check_duplicates(entry)
        return entry

    def _check_duplicates(self, entry: manifests.Segment) -> None:
        id_hashes = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        order = np.argsort(id_hashes, kind="stable")
        equal = np.flatnonzero(id_hashes[order][1:] == id_hashes[order][:-1])
        if len(equal):
            files = SegmentFiles(self.folder.parent, self.manifest, entry)
            for first, second in itertools.pairwise(files.ids(order[np.union1d(equal, equal + 1)])):
                if first == second:
                    raise UserError(f"the id {first!r} is given twice; expected a unique id for each item")


def write_segment(folder: Path, manifest: Manifest, first: Items, rest: Iterable[Items]) -> manifests.Segment:
    """Write blocks of items as a new segment, in the folder of an index.

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


def merge_segments(folder: Path, manifest: Manifest, segments: Iterable[SegmentFiles]) -> tuple[manifests.Segment, ...]:
    """Write all items that are not deleted as one new segment; no segment if all are deleted.

    Raises:
      UserError: a file is damaged, or two items have the same id.
    """
    writer = SegmentWriter(folder, manifest)
    at_once = max(COPIED_BYTES // (4 * manifest.levels[-1] * manifest.width), 1)
    for segment in segments:
        for block in segment.items(at_once):
            writer.write(*block)
    return (writer.close(),) if writer.item_count else ()


def copy_segment(folder: Path, segment: SegmentFiles) -> manifests.Segment:
    """Copy a segment to the folder of another index, and check it.

    Raises:
      UserError: a file is damaged.
    """
    entry = dataclasses.replace(segment.entry, name=new_name())
    target = folder / entry.name
    target.mkdir()
    for name, file in segment.files.items():
        writer, at_once = ChecksummedWriter(target / name), max(COPIED_BYTES // file.row_bytes, 1)
        for start in range(0, len(file), at_once):
            writer.write(file.read(start, min(start + at_once, len(file))))
            file.release()
        writer.close()
    write_checksums(target, segment.checksums)
    return entry


def new_name() -> str:
    """Return a random name for a segment."""
    return os.urandom(8).hex()


def write_checksums(folder: Path, content: bytes) -> None:
    """Write the last file of a segment. Its folder is on the disk when this returns."""
    writer = ChecksummedWriter(folder / CHECKSUMS)
    writer.write(content)
    writer.close()
    sync_folder(folder)
