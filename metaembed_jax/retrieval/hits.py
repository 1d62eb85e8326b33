"""The results of a search.

Q queries, k results of a query.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.retrieval.segment import SegmentFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """The best items of each query, best first. `scores, ids = hits` takes it apart, as a tuple of two.

    Attributes:
      scores: MaxSim, float32.
      ids: texts, an array of objects.
      read_metadata: called with the number of a query, returns the metadata of its hits.
      certified: mask of the queries whose hits are proven to be those of the exact vectors; None unless `certified=True`.
      uncertified_reason: why the others are not proven; empty if all are.
      rescored: the number of items of each query that were scored by their exact vectors; None unless `certified=True`.
    """

    scores: Float[np.ndarray, "Q k"]
    ids: np.ndarray
    read_metadata: Callable[[int], list[dict]] = dataclasses.field(repr=False)
    certified: Bool[np.ndarray, " Q"] | None = None
    uncertified_reason: str = ""
    rescored: Int[np.ndarray, " Q"] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.scores, self.ids))

    def __getitem__(self, number: int) -> np.ndarray:
        return (self.scores, self.ids)[number]

    def metadata(self, query: int) -> list[dict]:
        """Return the metadata of the hits of a query, which is read now, from the index as it was searched.

        Args:
          query: number of the query.

        Raises:
          UserError: the search had no such query, or a file is damaged.
        """
        if not isinstance(query, int | np.integer) or not 0 <= query < len(self.scores):
            raise UserError(f"query={query!r}: expected the number of one of the {len(self.scores)} queries of the search, from 0")
        return self.read_metadata(int(query))


def make_hits(segments: Sequence[SegmentFiles], scores_Qk: Float[np.ndarray, "Q k"], positions_Qk: Int[np.ndarray, "Q k"]) -> Hits:
    """Return the hits at some positions.

    Args:
      segments: those that were searched.
      positions_Qk: indices of the items among all, including deleted ones.
    """
    starts = np.cumsum([0, *map(len, segments)])

    def locate(position: int) -> tuple[SegmentFiles, int]:
        number = int(np.searchsorted(starts, position, side="right")) - 1
        return segments[number], int(position - starts[number])

    def read_id(position: int) -> str:
        segment, row = locate(position)
        return segment.ids([row])[0]

    def read_metadata(query: int) -> list[dict]:
        return [segment.metadata(row) for segment, row in map(locate, positions_Qk[query].tolist())]

    unique, inverse = np.unique(positions_Qk, return_inverse=True)
    ids = np.array([*map(read_id, unique.tolist()), None], object)[:-1]  # with None, the array is of objects
    return Hits(scores_Qk, ids[inverse.reshape(positions_Qk.shape)], read_metadata)
