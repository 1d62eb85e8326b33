"""A collection of Qdrant that follows an index: new and changed items are written, others are kept, and what is gone is deleted.

Each payload has a stamp, a hash of what was written, so the next run compares stamps and writes the rest, also after a kill. A run
reads the index once, in blocks. It holds in memory a block, and 64 bytes for each point of the collection.
"""

import hashlib
import json
import uuid
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.qdrant_collection import Collection
from metaembed_jax.retrieval.qdrant_points import NUMBER_BYTES, STAMP, as_payload, as_points, as_requests
from metaembed_jax.retrieval.stored_items import StoredItems

HEX = "S32"  # the 32 hex digits of a point or a stamp, as an array's type


class Followed(NamedTuple):
    """Numbers of items of a run.

    Attributes:
      written: items that were new or had changed.
      deleted: items that the index no longer has.
      kept: all others.
    """

    written: int
    deleted: int
    kept: int


def follow(collection: Collection, index: Index, progress: bool) -> Followed:
    """Give a collection the items of an index, and no others.

    Args:
      progress: show a bar.

    Raises:
      UserError: the index has vectors of another model, width or number, a file of it is damaged, or Qdrant does not answer.
    """
    _check(collection, index)
    points, stamps = _scan(collection)
    is_gone, written = np.ones(len(points), bool), 0
    with tqdm(total=len(index), desc=f"following to {collection.name}", unit="item", disable=not progress) as bar:
        for items in index.items(collection.facts["document_vectors"]):
            new_points = as_points(items.ids)
            new_stamps = [_stamp(*item) for item in zip(*items, strict=True)]
            rows = _find(points, new_points)
            is_gone[rows[rows >= 0]] = False
            is_kept = (rows >= 0) & (np.append(stamps, b"")[rows] == np.array(new_stamps, HEX))
            changed = np.flatnonzero(~is_kept).tolist()
            _write(collection, items, new_points, new_stamps, changed)
            written += len(changed)
            bar.update(len(items.ids))
    deleted = [str(uuid.UUID(point.decode())) for point in points[is_gone]]
    collection.delete(deleted)
    if written or deleted:
        collection.optimize()
    return Followed(written, len(deleted), len(index) - written)


def _check(collection: Collection, index: Index) -> None:
    """Check that a collection can hold the items of an index.

    Raises:
      UserError: the index has vectors of another model, width or number.
    """
    facts, name = collection.facts, f"{collection.server}: collection {collection.name!r}"
    if index.width != facts["dimension"] or index.vectors < facts["document_vectors"]:
        raise UserError(
            f"{name} stores {facts['document_vectors']} vectors of {facts['dimension']} numbers; {index.folder} has "
            f"{index.vectors} of {index.width}; create another collection"
        )
    if index.fingerprint not in ("", facts["fingerprint"]):
        raise UserError(
            f"{name} has vectors of the model {facts['fingerprint']!r}; those of {index.folder} are of {index.fingerprint!r}; "
            "create another collection with fingerprint=index.fingerprint"
        )


def _scan(collection: Collection) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a collection, ascending, and their stamps; empty for an item that `follow` did not write."""
    pages = [(np.zeros(0, HEX), np.zeros(0, HEX))]
    for payloads in collection.scan([STAMP]):
        points = [uuid.UUID(point).hex for point in payloads]
        pages.append((np.array(points, HEX), np.array([str(payload.get(STAMP, "")) for payload in payloads.values()], HEX)))
    points, stamps = (np.concatenate(arrays) for arrays in zip(*pages, strict=True))
    order = np.argsort(points)
    return points[order], stamps[order]


def _find(points: np.ndarray, new_points: list[str]) -> np.ndarray:
    """Return the row of each new point in the ascending points of a collection; -1 for those that it does not have."""
    new_N = np.array([uuid.UUID(point).hex for point in new_points], HEX)
    rows = np.searchsorted(points, new_N)
    return np.where(np.append(points, b"")[rows] == new_N, rows, -1)


def _stamp(item: str, vectors_RD: np.ndarray, metadata: dict) -> str:
    """Return a hash of all that is written of an item, 32 hex digits."""
    fields = json.dumps([item, vectors_RD.shape, metadata], sort_keys=True).encode()
    return hashlib.blake2b(fields + np.ascontiguousarray(vectors_RD).tobytes(), digest_size=16).hexdigest()


def _write(collection: Collection, items: StoredItems, points: list[str], stamps: list[str], rows: list[int]) -> None:
    payloads = [as_payload(items.ids[row], items.metadata[row], stamps[row]) for row in rows]
    vectors = [items.vectors[row] for row in rows]
    sizes = [len(payload) + NUMBER_BYTES * (array.size + array.shape[1]) for payload, array in zip(payloads, vectors, strict=True)]
    for request in as_requests(sizes):
        batch = slice(request.start, request.stop)
        collection.write([points[row] for row in rows[batch]], vectors[batch], payloads[batch])
