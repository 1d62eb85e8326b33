"""Exact vectors of items, read by position, and scores of them that do not depend on rounding.

Q queries, R vectors of a query or an item, D width of a vector, N all items, n items that are read.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float16, Int

from metaembed_jax.retrieval.segment import SegmentFiles

READ_NUMBERS = 2**22  # numbers of exact vectors that are in memory at once
UNITS, SQUARED_UNITS = 2.0**149, 2**298  # every float32 is a multiple of 1 / UNITS, and a product of two of 1 / SQUARED_UNITS


class ExactVectors:
    """The exact vectors of segments. The position of an item is its index among all, including deleted ones.

    Args:
      segments: segments in the order of their items.
      levels: numbers of vectors at which the levels end.
      width: numbers of a vector, D.
    """

    def __init__(self, segments: Sequence[SegmentFiles], levels: Sequence[int], width: int):
        self.segments, self._levels, self._width = segments, levels, width
        self._starts = np.cumsum([0, *map(len, segments)])

    def errors(self, vectors: int) -> Float16[np.ndarray, " N"]:
        """Return the largest error among the first vectors of each item; zeros if the vectors that are searched are exact."""
        return np.concatenate([np.zeros(0, np.float16), *(segment.largest_errors(vectors) for segment in self.segments)])

    def score(
        self, query_RD: Float[np.ndarray, "R D"], positions_n: Int[np.ndarray, " n"], vectors: int
    ) -> Float[np.ndarray, " n"]:
        """Return the scores of items by their first vectors, in float64. Items with equal vectors have the same bits."""
        query_RD, at_once = query_RD.astype(float), max(READ_NUMBERS // (vectors * self._width), 1)
        scores_n = np.zeros(len(positions_n))
        for start in range(0, len(positions_n), at_once):
            block = slice(start, start + at_once)
            vectors_nRD, counts_n = self._read(positions_n[block], vectors)
            is_padding_nR = np.arange(vectors) >= counts_n[:, None]
            with np.errstate(invalid="ignore"):  # the caller refuses what is not finite
                similarity_nRR = query_RD @ vectors_nRD.swapaxes(1, 2)  # a product of its own for each item
                scores_n[block] = np.where(is_padding_nR[:, None], -np.inf, similarity_nRR).max(2).sum(1)
        return scores_n

    def score_exactly(self, query_RD: Float[np.ndarray, "R D"], positions_n: Int[np.ndarray, " n"], vectors: int) -> list[int]:
        """Return the scores of items as integers, in units of 1 / `SQUARED_UNITS`. Items with equal vectors are scored once."""
        query_RD, scores = _as_integers(query_RD), {}
        keys = []
        for position in positions_n.tolist():
            (vectors_RD,), (count,) = self._read(np.array([position]), vectors)
            keys.append(hashlib.sha256(vectors_RD[:count].tobytes()).digest())
            if keys[-1] not in scores:
                scores[keys[-1]] = (query_RD @ _as_integers(vectors_RD[:count]).T).max(1).sum()
        return [scores[key] for key in keys]

    def _read(self, positions_n: Int[np.ndarray, " n"], vectors: int) -> tuple[Float[np.ndarray, "n R D"], Int[np.ndarray, " n"]]:
        """Return the first vectors of items, float64, padded with zeros, and how many each has."""
        vectors_nRD, counts_n = np.zeros((len(positions_n), vectors, self._width)), np.zeros(len(positions_n), int)
        segments_n = np.searchsorted(self._starts, positions_n, side="right") - 1
        for number in np.unique(segments_n).tolist():
            segment, numbers = self.segments[number], np.flatnonzero(segments_n == number)
            rows = positions_n[numbers] - self._starts[number]
            counts_n[numbers] = segment.counts.take(rows)
            for file, start, end in zip(segment.exact, (0, *self._levels), self._levels, strict=False):
                if start < vectors:
                    vectors_nRD[numbers, start:end] = file.take(rows)[:, : vectors - start]
        return vectors_nRD, counts_n


def _as_integers(vectors_RD: Float[np.ndarray, "R D"]) -> np.ndarray:
    """Return float32 numbers, of any float type, as Python's integers in units of 1 / `UNITS`."""
    return np.array([[int(number * UNITS) for number in vector] for vector in vectors_RD.tolist()], object)
