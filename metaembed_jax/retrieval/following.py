"""The stored items that a job keeps: those whose document has the same id and stamp. All other documents are pending.

N documents, S stored items, P documents to encode.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.manifest import Manifest, Segment
from metaembed_jax.retrieval.segment import SegmentFiles


class Match(NamedTuple):
    """Documents and stored items of a job.

    Attributes:
      is_kept_N: mask of the documents that are stored.
      segments: the stored segments; the items that the job does not keep are deleted.
      dropped: the number of them whose documents are gone; the other documents have changed.
    """

    is_kept_N: Bool[np.ndarray, " N"]
    segments: list[Segment]
    dropped: int


class Plan(NamedTuple):
    """The segments that a job keeps, and the documents that it encodes.

    Attributes:
      committed: segments of the index.
      draft: the manifest of the parts that are encoded already, and of the documents that were left out.
      matched: which documents are stored.
      stamps: stamps of all documents.
      pending: numbers of the documents to encode, ascending.
    """

    committed: list[Segment]
    draft: Manifest
    matched: Match
    stamps: UInt64[np.ndarray, " N"]
    pending: Int[np.ndarray, " P"]


def find_damage(folder: Path, manifest: Manifest, segments: Sequence[Segment]) -> dict[str, str]:
    """Check all files of segments, and return what is wrong with each damaged segment, by its name."""
    damage = {}
    for entry in segments:
        try:
            SegmentFiles(folder, manifest, entry).check_all()
        except (UserError, FileNotFoundError) as error:
            damage[entry.name] = str(error)
    return damage


def match(
    ids_N: UInt64[np.ndarray, " N"],
    stamps_N: UInt64[np.ndarray, " N"],
    folder: Path,
    manifest: Manifest,
    segments: Sequence[Segment],
) -> Match:
    """Find the stored item of each document.

    Args:
      ids_N: hashes of the ids of the documents, which are all different.
      stamps_N: their stamps.
      segments: an item that several of them have is kept in the first.

    Raises:
      UserError: a segment is damaged.
    """
    ids_S, stamps_S, is_alive_S = _read_keys(folder, manifest, segments)
    rows = np.flatnonzero(is_alive_S)
    ids, stamps = np.concatenate([ids_N, ids_S[rows]]), np.concatenate([stamps_N, stamps_S[rows]])
    order = np.lexsort((stamps, ids))  # is stable: a document is before the stored items that equal it
    equals_next = (np.diff(ids[order]) == 0) & (np.diff(stamps[order]) == 0)
    is_pair = equals_next & (order[:-1] < len(ids_N))
    is_kept_N, is_kept_S = np.zeros(len(ids_N), bool), np.zeros(len(ids_S), bool)
    is_kept_N[order[:-1][is_pair]] = True
    is_kept_S[rows[order[1:][is_pair] - len(ids_N)]] = True
    kept, first = [], 0
    for entry in segments:
        deleted = np.flatnonzero(~is_kept_S[first : first + entry.items])
        kept.append(dataclasses.replace(entry, deleted=tuple(deleted.tolist())))
        first += entry.items
    return Match(is_kept_N, kept, len(np.setdiff1d(ids_S[is_alive_S], ids_N)))


def _read_keys(folder: Path, manifest: Manifest, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return [S] of all stored items: id hashes and stamps, uint64, and a mask of those not deleted."""
    keys = [(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool))]
    for entry in segments:  # one is open at a time: a process may have some 65,000 mapped files
        segment = SegmentFiles(folder, manifest, entry)
        ids, stamps = (segment.files[name].read(0, len(segment)).copy() for name in ("id-hashes", "stamps"))
        keys.append((ids, stamps, segment.is_alive))
    ids_S, stamps_S, is_alive_S = (np.concatenate(arrays) for arrays in zip(*keys, strict=True))
    return ids_S, stamps_S, is_alive_S
