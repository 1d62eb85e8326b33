"""From documents to an index: encoded part by part, each on the disk before the next one, so that a killed job goes on."""

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
from metaembed_jax.model import MetaEmbed, join_shares
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.index import Index, check_dtype
from metaembed_jax.retrieval.items import make_items
from metaembed_jax.retrieval.manifest import Manifest, levels_of
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.writer import SegmentWriter, merged
from metaembed_jax.sharding import batch_shards

PART = 256  # documents of a device that are encoded before they are written


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
    """The index of documents in a folder. Killed and called again, it goes on where it was; one that is complete is only opened.

    An index of other documents, or of another model, is replaced when this one is complete. Metadata of an item are its path, page
    and text, those that it has. Several hosts encode together, and the first one writes.

    Args:
      documents: of `open_documents`.
      path: of the folder.
      name: the path or hub id that finds the model again.
      budget: vectors of each item to keep; all by default.
      dtype: of the vectors on disk, as for `Index.build`.
      progress: show a bar.

    Raises:
      UserError: a document that cannot be read, a budget beyond the model's, or a folder that is something else or being written.
    """
    check_dtype(dtype)
    folder, most = local_path(path), model.config.vectors("document")
    budget = most if budget is None else budget
    if type(budget) is not int or not 1 <= budget <= most:
        raise UserError(f"budget={budget!r}: this model has 1 to {most} candidate vectors")
    if not len(documents):
        raise UserError("there is nothing to index: no document was given")
    about = {"name": name, "fingerprint": model.fingerprint}
    wanted = Manifest(model.dimension, levels_of(budget), dtype, model=about, job=_job(documents, model.fingerprint, budget, dtype))
    with store.writing(folder) if hosts.is_first() else contextlib.nullcontext():
        draft = _begin(folder, wanted) if hosts.is_first() else wanted
        done = int(hosts.from_first(str(len(documents) if draft is None else sum(one.items for one in draft.segments))))
        size = PART * batch_shards(model.mesh)
        with tqdm(total=len(documents), initial=done, desc="indexing", unit="item", disable=not progress) as bar:
            for block in model.encode_blocks(documents, "document", budget=budget, size=size, start=done, bar=bar):
                vectors_nRD = join_shares(block.numbers - block.items.start, block.vectors, len(block.items))
                if hosts.is_first():
                    draft = _write(folder, draft, Part(documents, block.items), vectors_nRD)
        if hosts.is_first() and draft is not None:
            files = [SegmentFiles(folder, draft, one) for one in draft.segments]
            store.commit(folder, dataclasses.replace(draft, segments=merged(folder, draft, files)))
    hosts.wait_for_all("indexed")
    return Index(folder)


class Part:
    """Some documents, as an index names them."""

    def __init__(self, documents: Documents, numbers: range):
        self.documents, self.numbers = documents, numbers

    def ids(self) -> list[str]:
        """Of each document."""
        return [self.documents.about(number)["id"] for number in self.numbers]

    def metadata(self) -> list[dict]:
        """The path, page and text of each, those that it has."""
        return [_known(self.documents.about(number)) for number in self.numbers]


def _job(documents: Documents, *how) -> str:
    """Says which documents are indexed, and how."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in documents.files]
    return digest(repr((len(documents), files, how)).encode())


def _begin(folder: Path, wanted: Manifest) -> Manifest | None:
    """What there is of an index so far; None if it is complete. All else that was never completed is removed."""
    complete = store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None
    if complete and complete.job == wanted.job:
        return None
    draft = store.read_draft(folder, wanted.job) or wanted
    store.clean(folder, complete, draft)
    return draft


def _write(folder: Path, draft: Manifest, part: Part, vectors_nRD: Float[np.ndarray, "n R D"]) -> Manifest:
    """The draft with a segment more."""
    writer = SegmentWriter(folder, draft)
    writer.add(make_items(vectors_nRD, part.ids(), part.metadata(), None))
    draft = dataclasses.replace(draft, segments=(*draft.segments, writer.close()))
    store.write_draft(folder, draft)
    return draft


def _known(about: dict) -> dict:
    path = about["path"] and os.path.abspath(about["path"])  # the index may be searched from elsewhere
    return {key: value for key, value in (about | {"path": path}).items() if key != "id" and value is not None}
