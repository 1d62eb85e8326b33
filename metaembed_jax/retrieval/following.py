"""The stored items that a job keeps: those whose document has the same id and stamp. All other documents are pending.

N documents, S stored items.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt64

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.manifest import Manifest
from metaembed_jax.retrieval.segment import SegmentFiles


class Match(NamedTuple):
    """Documents and stored items of a job.

    Attributes:
      is_kept_N: mask of the documents that are stored.
      segments: the stored segments, without the items that the job does not keep.
      gone_S: hashes of the ids of the items that it does not keep.
    """

    is_kept_N: Bool[np.ndarray, " N"]
    segments: list[SegmentFiles]
    gone_S: UInt64[np.ndarray, " S"]


def open_sound(folder: Path, manifest: Manifest) -> tuple[list[SegmentFiles], dict[str, str]]:
    """Open the segments of a manifest and check all of their files.

    Returns:
      The segments that are sound, and what is wrong with each of the others, by name.
    """
    segments, damage = [], {}
    for entry in manifest.segments:
        try:
            segment = SegmentFiles(folder, manifest, entry)
            with ThreadPoolExecutor() as threads:  # checksums are computed without Python's lock
                list(threads.map(lambda file: (file.check_all(), file.release()), segment.files.values()))
            segments.append(segment)
        except (UserError, FileNotFoundError) as error:
            damage[entry.name] = str(error)
    return segments, damage


def match(ids_N: UInt64[np.ndarray, " N"], stamps_N: UInt64[np.ndarray, " N"], segments: Sequence[SegmentFiles]) -> Match:
    """Find the stored item of each document.

    Args:
      ids_N: hashes of the ids of the documents, which are all different.
      stamps_N: their stamps.
      segments: an item that several of them have is kept in the first.
    """
    stored_ids, stored_stamps = (
        np.concatenate([np.zeros(0, np.uint64), *(segment.files[name].read(0, len(segment)) for segment in segments)])
        for name in ("id-hashes", "stamps")
    )
    is_alive = np.concatenate([np.zeros(0, bool), *(segment.is_alive for segment in segments)])
    rows = np.flatnonzero(is_alive)
    id_hashes, stamps = np.concatenate([ids_N, stored_ids[rows]]), np.concatenate([stamps_N, stored_stamps[rows]])
    order = np.lexsort((stamps, id_hashes))  # is stable: a document is before the stored items that equal it
    equals_previous = (np.diff(id_hashes[order]) == 0) & (np.diff(stamps[order]) == 0)
    is_pair = equals_previous & (order[:-1] < len(ids_N))
    is_kept_N, is_stored = np.zeros(len(ids_N), bool), np.zeros(len(stored_ids), bool)
    is_kept_N[order[:-1][is_pair]] = True
    is_stored[rows[order[1:][is_pair] - len(ids_N)]] = True
    ends = np.cumsum([len(segment) for segment in segments])[:-1]
    kept = [segment.only(mask) for segment, mask in zip(segments, np.split(is_stored, ends), strict=True)] if segments else []
    return Match(is_kept_N, kept, stored_ids[is_alive & ~is_stored])
