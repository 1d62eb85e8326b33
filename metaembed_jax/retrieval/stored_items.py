"""The items of an index, read back in blocks of bounded memory.

N items of a block, R vectors of an item, D width of a vector.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from metaembed_jax.retrieval.segment import SegmentFiles

BLOCK_NUMBERS, BLOCK_ITEMS = 2**22, 1024  # numbers and items of a block


class StoredItems(NamedTuple):
    """Items of a block that are not deleted.

    Attributes:
      ids: their ids.
      vectors: float32 [R, D] of each; an item may have fewer vectors than others.
      metadata: a dict for each.
    """

    ids: list[str]
    vectors: list[Float[np.ndarray, "_ D"]]
    metadata: list[dict]


def read_items(segments: Sequence[SegmentFiles], levels: Sequence[int], vectors: int) -> Iterator[StoredItems]:
    """Yield the items of segments, in order.

    Args:
      levels: numbers of vectors at which the levels end.
      vectors: most vectors of an item to read, from the first; at most the end of the last level.

    Raises:
      UserError: a file is damaged.
    """
    count = 1 + sum(end < vectors for end in levels)  # of levels to read
    for segment in segments:
        width = segment.levels[0].read(0, 0).shape[2]
        at_once = max(1, min(BLOCK_NUMBERS // (levels[count - 1] * width), BLOCK_ITEMS))
        for start in range(0, len(segment), at_once):
            rows = start + np.flatnonzero(segment.is_alive[start : start + at_once])
            vectors_NRD = _read_vectors(segment, rows, count)[:, :vectors]
            counts = np.minimum(segment.counts.take(rows), vectors).tolist()
            items = [vectors_RD[:stored] for vectors_RD, stored in zip(vectors_NRD, counts, strict=True)]
            yield StoredItems(segment.ids(rows), items, [segment.metadata(row) for row in rows.tolist()])
            segment.release()


def _read_vectors(segment: SegmentFiles, rows: np.ndarray, count: int) -> Float[np.ndarray, "N R D"]:
    """Return the vectors of the first levels, the exact ones if the segment has them."""
    if segment.exact:
        return np.concatenate([level.take(rows).astype(np.float32) for level in segment.exact[:count]], axis=1)
    levels = zip(segment.levels[:count], segment.scales[:count], strict=True)
    return np.concatenate([level.take(rows) * scales.take(rows)[..., None] for level, scales in levels], axis=1)
