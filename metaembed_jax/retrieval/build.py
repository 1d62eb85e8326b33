"""Indexes that follow their documents: what is new or changed is encoded, what is gone is dropped, and all else is kept.

Documents are encoded in parts. Each part is on the disk before the next is encoded, so a killed job loses at most one.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64
from tqdm import tqdm

from metaembed_jax.data.documents import Documents
from metaembed_jax.encoding.encoder import EncodedBlock
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, local_path
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
      draft: the manifest of the parts that are encoded already.
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
    progress: bool = False,
) -> Index:
    """Index documents in a folder, or let the index in it follow them.

    Documents that are new or changed are encoded; items of documents that are gone, and items added by hand, are dropped. A killed
    job resumes when it is called again. An index of another model, budget or dtype is replaced when the new one is complete. The
    metadata of an item are those of its path, page and text that it has. All hosts encode, and the first one writes.

    Args:
      documents: from `open_documents`.
      path: the folder of the index.
      name: the path or hub id of the model, for later searches.
      budget: vectors of each document to keep; all by default.
      dtype: type of the vectors on disk, as for `Index.build`.
      progress: show a bar, and print how many items were encoded, kept and dropped.

    Raises:
      UserError: a document cannot be read, the budget is larger than the model's, the folder holds something else, or another
        process is writing to it.
    """
    check_dtype(dtype)
    folder, limit = local_path(path), model.config.vectors("document")
    budget = limit if budget is None else budget
    if type(budget) is not int or not 1 <= budget <= limit:
        raise UserError(f"budget={budget!r}: expected 1 to {limit} document vectors, which this model has")
    if not len(documents):
        raise UserError("nothing to index: expected at least one document")
    origin, job = {"name": name, "fingerprint": model.fingerprint}, digest(repr((model.fingerprint, budget, dtype)).encode())
    empty = Manifest(model.dimension, levels_of(budget), dtype, model=origin, job=job)
    with store.writing(folder):
        work = _plan(folder, documents, empty)
        work = _encode(folder, model, documents, work, progress)
        groups = tiers(work.kept, work.parts)
        segments = [segment for group in groups for segment in merge_tier(folder, empty, group)]
        store.commit(folder, dataclasses.replace(empty, segments=tuple(segments)))
    index = Index(folder)
    if progress:
        print(f"{path}: {_summary(index, work)}", flush=True)
    return index


def _plan(folder: Path, documents: Documents, empty: Manifest) -> Work:
    """Find the documents that are stored. Files of other unfinished jobs are removed."""
    present = store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None
    committed = present.segments if present and present.job == empty.job else ()
    draft = store.read_draft(folder, empty.job) or empty
    drafted = tuple(segment for segment in draft.segments if segment not in committed)
    store.clean(folder, present, draft)
    segments, damage = open_sound(folder, dataclasses.replace(empty, segments=committed + drafted))
    if damage:
        lost = sum(segment.items - len(segment.deleted) for segment in committed + drafted if segment.name in damage)
        tqdm.write(f"{next(iter(damage.values()))}\n{folder}: {lost:,} items are damaged, and their documents are encoded again")
    ids, stamps = hashes(documents.ids()), documents.stamps()
    matched = match(ids, stamps, segments)
    parts = [segment for segment in matched.segments if segment.entry.name in {entry.name for entry in drafted}]
    kept = [segment for segment in matched.segments if segment not in parts]
    draft = dataclasses.replace(empty, segments=tuple(segment for segment in drafted if segment.name not in damage))
    return Work(draft, kept, parts, matched, ids, stamps, np.flatnonzero(~matched.is_kept_N))


def _encode(folder: Path, model: MetaEmbed, documents: Documents, work: Work, progress: bool) -> Work:
    """Encode the pending documents, and return the work with their parts."""
    draft, parts, count = work.draft, list(work.parts), len(documents)
    size, budget = BLOCK_DOCUMENTS * batch_shards(model.mesh), draft.levels[-1]
    items, initial = Selected(documents, work.pending), count - len(work.pending)
    with tqdm(total=count, initial=initial, desc="indexing", unit="item", disable=not progress) as bar:
        for block in model.encode_blocks(items, "document", budget=budget, size=size, bar=bar):
            entry = _write(folder, draft, documents, work, block)
            draft = dataclasses.replace(draft, segments=(*draft.segments, entry))
            store.write_draft(folder, draft)
            parts.append(SegmentFiles(folder, draft, entry))
    return work._replace(draft=draft, parts=parts)


def _write(folder: Path, draft: Manifest, documents: Documents, work: Work, block: EncodedBlock) -> Segment:
    """Write the documents of a part as a segment."""
    numbers = work.pending[block.numbers]
    descriptions = [documents.metadata(number) for number in numbers.tolist()]
    ids = [description["id"] for description in descriptions]
    writer = SegmentWriter(folder, draft)
    items = make_items(block.vectors, ids, [_metadata(description) for description in descriptions], None)
    writer.add(items, work.stamps[numbers])
    return writer.close()


def _metadata(description: dict) -> dict:
    path = description["path"] and os.path.abspath(description["path"])  # the index may be searched from another folder
    return {key: value for key, value in (description | {"path": path}).items() if key != "id" and value is not None}


def _summary(index: Index, work: Work) -> str:
    encoded, kept = len(work.pending), int(work.matched.is_kept_N.sum())
    dropped = len(np.unique(work.matched.gone_S))
    if not encoded + dropped:
        return f"{len(index):,} items, {index.vectors} vectors each; nothing is new, changed or gone."
    return f"{len(index):,} items ({encoded:,} encoded, {kept:,} kept, {dropped:,} dropped), {index.vectors} vectors each."
