"""Indexing of documents, block by block. Each block is written to disk before the next is encoded, so a killed job resumes."""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.data.documents import Documents
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest, local_path
from metaembed_jax.hosts.shares import join_shares
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.index import Index, check_dtype
from metaembed_jax.retrieval.ingest import make_items
from metaembed_jax.retrieval.manifest import Manifest, levels_of
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.writer import SegmentWriter, merge_segments
from metaembed_jax.sharding import batch_shards

BLOCK_DOCUMENTS = 256  # documents of a device in a block


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
    """Index documents in a folder. A killed job resumes when it is called again; a complete index is only opened.

    An index of other documents, or of another model, is replaced when the new one is complete. The metadata of an item are those of
    its path, page and text that it has. All hosts encode, and the first one writes.

    Args:
      documents: from `open_documents`.
      path: the folder of the index.
      name: the path or hub id of the model, for later searches.
      budget: vectors of each document to keep; all by default.
      dtype: type of the vectors on disk, as for `Index.build`.
      progress: show a bar.

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
    origin, job = {"name": name, "fingerprint": model.fingerprint}, _job(documents, model.fingerprint, budget, dtype)
    empty = Manifest(model.dimension, levels_of(budget), dtype, model=origin, job=job)
    with store.writing(folder) if hosts.is_first() else contextlib.nullcontext():
        draft, is_complete = _resume(folder, empty) if hosts.is_first() else (empty, False)
        indexed = len(documents) if is_complete else sum(segment.items for segment in draft.segments)
        start = int(hosts.from_first(str(indexed)))
        size = BLOCK_DOCUMENTS * batch_shards(model.mesh)
        with tqdm(total=len(documents), initial=start, desc="indexing", unit="item", disable=not progress) as bar:
            for block in model.encode_blocks(documents, "document", budget=budget, size=size, start=start, bar=bar):
                vectors_nRD = join_shares(block.numbers - block.items.start, block.vectors, len(block.items))
                if hosts.is_first():
                    draft = _write(folder, draft, documents, block.items, vectors_nRD)
        if hosts.is_first() and not is_complete:
            segments = [SegmentFiles(folder, draft, segment) for segment in draft.segments]
            store.commit(folder, dataclasses.replace(draft, segments=merge_segments(folder, draft, segments)))
    hosts.wait_for_all("indexed")
    return Index(folder)


def _job(documents: Documents, *options) -> str:
    """Return a digest of the documents and of how they are indexed."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in documents.files]
    return digest(repr((len(documents), files, options)).encode())


def _resume(folder: Path, empty: Manifest) -> tuple[Manifest, bool]:
    """Return the manifest of a job so far, and whether its index is complete. Unfinished files of other jobs are removed."""
    present = store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None
    if present and present.job == empty.job:
        return present, True
    draft = store.read_draft(folder, empty.job) or empty
    store.clean(folder, present, draft)
    return draft, False


def _write(
    folder: Path, draft: Manifest, documents: Documents, numbers: range, vectors_nRD: Float[np.ndarray, "n R D"]
) -> Manifest:
    """Write documents as a segment, and return the draft with this segment added."""
    descriptions = [documents.metadata(number) for number in numbers]
    ids = [description["id"] for description in descriptions]
    writer = SegmentWriter(folder, draft)
    writer.add(make_items(vectors_nRD, ids, [_metadata(description) for description in descriptions], None))
    draft = dataclasses.replace(draft, segments=(*draft.segments, writer.close()))
    store.write_draft(folder, draft)
    return draft


def _metadata(description: dict) -> dict:
    path = description["path"] and os.path.abspath(description["path"])  # the index may be searched from another folder
    return {key: value for key, value in (description | {"path": path}).items() if key != "id" and value is not None}
