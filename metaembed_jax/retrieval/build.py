"""Indexes that follow their documents: what is new or changed is encoded, what is gone is dropped, and all else is kept.

Documents are encoded in parts. Each part is on the disk before the next is encoded, so a killed job loses at most one.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64
from tqdm import tqdm

from metaembed_jax.data.documents import Documents
from metaembed_jax.data.left_out import LeftOut, check_left_out
from metaembed_jax.encoding.encoder import EncodedBlock
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, local_path
from metaembed_jax.flags import printable
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.following import Match, match, open_sound
from metaembed_jax.retrieval.index import Index, check_dtype
from metaembed_jax.retrieval.ingest import hashes, make_items
from metaembed_jax.retrieval.manifest import Manifest, Segment, levels_of
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.tiers import merge_tier, tiers
from metaembed_jax.retrieval.writer import SegmentWriter
from metaembed_jax.sharding import batch_shards

BLOCK_DOCUMENTS = 256  # documents of a device in a part


class Work(NamedTuple):
    """A job to do.

    Attributes:
      draft: the manifest of the parts that are encoded already, and of the documents that were left out.
      kept: segments of the index.
      parts: segments of the draft.
      matched: which documents are stored.
      ids: hashes of the ids of all documents.
      stamps: stamps of all documents.
      pending: numbers of the documents to encode, ascending.
    """

    draft: Manifest
    kept: list[SegmentFiles]
    parts: list[SegmentFiles]
    matched: Match
    ids: UInt64[np.ndarray, " N"]
    stamps: UInt64[np.ndarray, " N"]
    pending: Int[np.ndarray, " P"]


class Selected(Sequence):
    """Some documents, for the encoder.

    Args:
      documents: all documents.
      numbers: the numbers of those that are selected.
    """

    def __init__(self, documents: Documents, numbers: Int[np.ndarray, " P"]):
        self._documents, self._numbers = documents, numbers.tolist()
        if describe := getattr(documents, "describe", None):  # without it, the encoder reads an item once
            self.describe = lambda number: describe(self._numbers[number])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number):
        return self._documents[self._numbers[number]]

    def item_name(self, number: int) -> str:
        """Return the name of a document in errors."""
        return self._documents.item_name(self._numbers[number])


def index_documents(
    model: MetaEmbed,
    documents: Documents,
    path: str | os.PathLike,
    *,
    name: str = "",
    budget: int | None = None,
    dtype: str = "bfloat16",
    skip: int = 0,
    progress: bool = False,
) -> Index:
    """Index documents in a folder, or let the index in it follow them.

    Documents that are new or changed are encoded; items of documents that are gone, and items added by hand, are dropped. A killed
    job resumes when it is called again. An index of another model, budget or dtype is replaced when the new one is complete. The
    metadata of an item are those of its path, page and text that it has. `Index.left_out` lists the documents that cannot be read;
    the next job tries them again. All hosts encode, and the first one writes.

    Args:
      documents: from `open_documents`.
      path: the folder of the index.
      name: the path or hub id of the model, for later searches.
      budget: vectors of each document to keep; all by default.
      dtype: type of the vectors on disk, as for `Index.build`.
      skip: most documents that may be left out because they cannot be read. The job stops at more, and keeps what it has encoded.
      progress: show a bar, and print how many items were encoded, kept and dropped, and which documents were left out.

    Raises:
      UserError: more documents than `skip` cannot be read, the budget is larger than the model's, the folder holds something else,
        or another process is writing to it.
    """
    check_dtype(dtype)
    folder, limit = local_path(path), model.config.vectors("document")
    budget = limit if budget is None else budget
    if type(budget) is not int or not 1 <= budget <= limit:
        raise UserError(f"budget={budget!r}: expected 1 to {limit} document vectors, which this model has")
    check_left_out(documents.left_out, skip)
    if not len(documents):
        raise UserError("nothing to index: expected at least one document")
    origin, job = {"name": name, "fingerprint": model.fingerprint}, digest(repr((model.fingerprint, budget, dtype)).encode())
    empty = Manifest(model.dimension, levels_of(budget), dtype, model=origin, job=job)
    with store.writing(folder):
        work = _plan(folder, documents, empty, skip)
        work = _encode(folder, model, documents, work, skip, progress)
        groups = tiers(work.kept, work.parts)
        if not groups:
            raise UserError(f"nothing to index: none of {len(documents):,} documents can be read")
        segments = [segment for group in groups for segment in merge_tier(folder, empty, group)]
        left_out = (*((*document, 0) for document in documents.left_out), *work.draft.left_out)
        is_changed = store.commit(folder, dataclasses.replace(empty, segments=tuple(segments), left_out=left_out))
    index = Index(folder)
    if progress:
        print(f"{path}: {_summary(index, work, is_changed)}", flush=True)
    return index


def _plan(folder: Path, documents: Documents, empty: Manifest, skip: int) -> Work:
    """Find the documents that are stored. Files of other unfinished jobs are removed."""
    present = store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None
    committed = present.segments if present and present.job == empty.job else ()
    draft = store.read_draft(folder, empty.job) or empty
    drafted = tuple(segment for segment in draft.segments if segment.name not in {entry.name for entry in committed})
    store.clean(folder, present, draft)
    segments, damage = open_sound(folder, dataclasses.replace(empty, segments=committed + drafted))
    if damage:
        lost = sum(segment.items - len(segment.deleted) for segment in committed + drafted if segment.name in damage)
        tqdm.write(f"{next(iter(damage.values()))}\n{folder}: {lost:,} items are damaged, and their documents are encoded again")
    ids, stamps = hashes(documents.ids()), documents.stamps()
    matched = match(ids, stamps, segments)
    parts = [segment for segment in matched.segments if segment.entry.name in {entry.name for entry in drafted}]
    kept = [segment for segment in matched.segments if segment not in parts]
    sound = tuple(segment for segment in drafted if segment.name not in damage)
    is_tried_N, left_out = _tried(draft, ids, stamps)
    if len(documents.left_out) + len(left_out) > skip:  # the job has stopped at them: they may be readable by now
        is_tried_N, left_out = np.zeros(len(ids), bool), ()
    draft = dataclasses.replace(empty, segments=sound, left_out=left_out)
    return Work(draft, kept, parts, matched, ids, stamps, np.flatnonzero(~matched.is_kept_N & ~is_tried_N))


def _tried(draft: Manifest, ids_N: np.ndarray, stamps_N: np.ndarray) -> tuple[Bool[np.ndarray, " N"], tuple]:
    """Return a mask of the documents that a draft leaves out and that have not changed since, and their entries."""
    is_tried_N, entries = np.zeros(len(ids_N), bool), []
    for item, reason, stamp in draft.left_out:
        is_same_N = (ids_N == hashes([item])) & (stamps_N == np.uint64(stamp))
        entries += [(item, reason, stamp)] if is_same_N.any() else []
        is_tried_N |= is_same_N
    return is_tried_N, tuple(entries)


def _encode(folder: Path, model: MetaEmbed, documents: Documents, work: Work, skip: int, progress: bool) -> Work:
    """Encode the pending documents, and return the work with their parts.

    Raises:
      UserError: more documents than `skip` cannot be read. The draft has all that were encoded before.
    """
    draft, parts, count = work.draft, list(work.parts), len(documents)
    size, budget = BLOCK_DOCUMENTS * batch_shards(model.mesh), draft.levels[-1]
    items, initial = Selected(documents, work.pending), count - len(work.pending)
    with tqdm(total=count, initial=initial, desc="indexing", unit="item", disable=not progress) as bar:
        for block in model.encode_blocks(items, "document", budget=budget, size=size, bar=bar, allow_failures=True):
            draft = _write(folder, draft, documents, work, block)
            parts += [SegmentFiles(folder, draft, entry) for entry in draft.segments[len(parts) :]]
            check_left_out([*documents.left_out, *_left_out(draft)], skip)
    return work._replace(draft=draft, parts=parts)


def _write(folder: Path, draft: Manifest, documents: Documents, work: Work, block: EncodedBlock) -> Manifest:
    """Write the documents of a part as a segment, and return the draft with it and with the documents that are left out."""
    failed = [(int(work.pending[number]), reason) for number, reason in sorted(block.failures.items())]
    left_out = [(documents.metadata(number)["id"], reason, int(work.stamps[number])) for number, reason in failed]
    draft = dataclasses.replace(draft, left_out=(*draft.left_out, *left_out))
    if len(block.numbers):
        draft = dataclasses.replace(draft, segments=(*draft.segments, _write_segment(folder, draft, documents, work, block)))
    store.write_draft(folder, draft)
    return draft


def _write_segment(folder: Path, draft: Manifest, documents: Documents, work: Work, block: EncodedBlock) -> Segment:
    numbers = work.pending[block.numbers]
    descriptions = [documents.metadata(number) for number in numbers.tolist()]
    ids = [description["id"] for description in descriptions]
    writer = SegmentWriter(folder, draft)
    items = make_items(block.vectors, ids, [_metadata(description) for description in descriptions], None)
    writer.add(items, work.stamps[numbers])
    return writer.close()


def _left_out(manifest: Manifest) -> list[LeftOut]:
    return [LeftOut(item, reason) for item, reason, _ in manifest.left_out]


def _metadata(description: dict) -> dict:
    path = description["path"] and os.path.abspath(description["path"])  # the index may be searched from another folder
    return {key: value for key, value in (description | {"path": path}).items() if key != "id" and value is not None}


def _summary(index: Index, work: Work, is_changed: bool) -> str:
    kept, dropped = int(work.matched.is_kept_N.sum()), len(np.unique(work.matched.gone_S))
    encoded, count = len(index) - kept, len(index.left_out)
    counts = f"{encoded:,} encoded, {kept:,} kept, {dropped:,} dropped" + f", {count:,} left out" * bool(count)
    lines = [f"  left out {printable(item)}: {printable(reason)}" for item, reason in index.left_out]
    items = f"{len(index):,} items ({counts})" if is_changed else f"{len(index):,} items, nothing new, changed or gone"
    return "\n".join([f"{items}, {index.vectors} vectors each.", *lines])
