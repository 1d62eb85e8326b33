"""Documents on devices, as tiles: blocks of documents whose vectors are stored by number, first all first vectors.

    tile t, vector 0    document 0, 1, ... n-1     [n, D]
            vector 1    document 0, 1, ... n-1
            ...
            vector R-1

So the first r_c vectors of a tile are stored together, and a search at any budget reads its own vectors and no others. One matrix
product scores them, and the maximum over a document's vectors runs along whole rows of documents. A budget with a width reads the
first numbers of each vector; the factor that makes them a unit vector is a scale.

T tiles, R vectors of a document, n documents of a tile, D width of a vector, N documents.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

TILE = 128  # documents of a tile: whole registers on every chip


class Tiles(NamedTuple):
    """Documents in the order of their positions; sharded by tiles.

    Attributes:
      vectors: [T, R, n, D], float32, bfloat16 or int8.
      scales: float32 [T, R, n], a factor for each vector of int8; None for floats.
      counts: int32 [T, n], the number of vectors of each document; None if all have R.
      is_candidate: bool [T, n], False for padding, and for documents that are deleted or filtered out.
      first: int32 [], the position of the first document; it is the same on all devices.
      prefixes: by width, the scales [T, R, n] of vectors that are cut to it.
    """

    vectors: Shaped[Array, "T R n D"]
    scales: Float[Array, "T R n"] | None
    counts: Int[Array, "T n"] | None
    is_candidate: Bool[Array, "T n"]
    first: Int[Array, ""]
    prefixes: dict[int, Float[Array, "T R n"]] = {}

    @property
    def documents(self) -> int:
        """The number of documents, with padding."""
        tiles, documents = self.is_candidate.shape
        return tiles * documents

    def at_width(self, width: int) -> "Tiles":
        """Return tiles with the scales of vectors that are cut to a width. The vectors stay whole; who reads them cuts them."""
        return self if width == self.vectors.shape[3] else self._replace(scales=self.prefixes[width])


def count_tiles(documents: int, shards: int) -> int:
    """Return the number of tiles for some documents on some shards: as many on each shard, at least one."""
    return max(-(-documents // (TILE * shards)), 1) * shards


def write_rows(tiles_TRnx: Shaped[np.ndarray, "T R n *x"], array_NRx: Shaped[np.ndarray, "N R *x"]) -> None:
    """Write documents into tiles, whose type may be wider."""
    documents, vectors, *row = array_NRx.shape
    size = tiles_TRnx.shape[2]
    full, rest = divmod(documents, size)
    tiles_TRnx[:full] = array_NRx[: full * size].reshape(full, size, vectors, *row).swapaxes(1, 2)
    if rest:
        tiles_TRnx[full, :, :rest] = array_NRx[full * size :].swapaxes(0, 1)
