"""Read documents from the files of an index into tiles on the devices of a mesh.

N documents, R vectors of a document, T tiles, n documents of a tile, D width of a vector.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.prefixes import SQUARED_LENGTH
from metaembed_jax.late_interaction.tiles import TILE, Tiles, count_tiles, write_rows
from metaembed_jax.retrieval.checksummed_files import ChecksummedFile
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.sharding import put_replicated

ALIGNMENT = 64  # bytes
LARGEST_SCALE = 2.0  # a unit vector's is at most its length, with room for rounding
READ_NUMBERS = 2**23  # of vectors that are read before the memory of the files is released


class TileReader:
    """The vectors of segments, and the devices that they are read to.

    Args:
      segments: segments in the order of their items.
      levels: numbers of vectors at which the levels end.
      width: numbers of a vector, D.
      mesh: devices.

    Attributes:
      starts: the position of the first document of each segment, and the number of all documents.
    """

    def __init__(self, segments: Sequence[SegmentFiles], levels: Sequence[int], width: int, mesh: Mesh):
        self.segments, self.mesh = segments, mesh
        self.starts = np.cumsum([0, *map(len, segments)])
        self._levels, self._width = tuple(levels), width
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        # XLA on a CPU converts bfloat16 more slowly than it multiplies float32, and scales similarities as slowly.
        self._is_widened = mesh.devices.flat[0].platform == "cpu"
        self.dtype = np.dtype(np.float32) if self._is_widened else segments[0].levels[0].dtype
        self._has_scales = bool(segments[0].scales) and not self._is_widened

    def read(self, positions_n: Int[np.ndarray, " n"], tiles: int, vectors: int, width: int, first: int) -> Tiles:
        """Read the first `vectors` vectors of documents at ascending positions; all of them are candidates.

        Args:
          tiles: a multiple of the devices, for at least so many documents.
          width: numbers to read of a vector, at most D.
          first: as in `Tiles`.

        Raises:
          UserError: a file is damaged.
        """
        shape, put = (tiles, vectors, TILE), self._put
        read_vectors = functools.partial(self._read_vectors, width=width)
        write_vectors = functools.partial(self._write_levels, read_vectors, vectors=vectors)
        is_ragged = vectors > min(segment.entry.fewest for segment in self.segments)
        return Tiles(
            put((*shape, width), self.dtype, positions_n, write_vectors, vectors * self._width),
            self.read_scales(positions_n, tiles, vectors, width),
            put((tiles, TILE), np.int32, positions_n, self._write_counts, 1) if is_ragged else None,
            self.mask(np.ones(len(positions_n), bool), tiles),
            put_replicated(np.asarray(first, np.int32), self.mesh),
        )

    def read_scales(self, positions_n: Int[np.ndarray, " n"], tiles: int, vectors: int, width: int) -> jax.Array | None:
        """Read the scales of vectors that are cut to a width; None for whole vectors of floats.

        Args:
          positions_n, tiles, vectors, width: as for `read`.

        Raises:
          UserError: a file is damaged.
        """
        if width == self._width and not self._has_scales:
            return None
        read, numbers = self._read_scales, vectors
        if width < self._width:
            read, numbers = functools.partial(self._read_prefix_scales, width=width), vectors * self._width
        write = functools.partial(self._write_levels, read, vectors=vectors)
        return self._put((tiles, vectors, TILE), np.float32, positions_n, write, numbers)

    def _write_levels(
        self,
        read: Callable[[int, int, np.ndarray], np.ndarray],
        shard_TRnx: np.ndarray,
        positions_n: Int[np.ndarray, " n"],
        vectors: int,
    ) -> None:
        start = 0
        for number, end in enumerate(self._levels):
            if start < vectors:
                write_rows(shard_TRnx[:, start:end], read(number, vectors - start, positions_n))
            start = end

    def _read_vectors(self, level: int, vectors: int, positions_n: Int[np.ndarray, " n"], width: int) -> np.ndarray:
        rows = self._read(lambda segment: segment.levels[level], positions_n)[:, :vectors, :width]
        if self._is_widened and self.segments[0].scales:
            return rows * self._read_scales(level, vectors, positions_n)[..., None]
        return rows

    def _read_scales(self, level: int, vectors: int, positions_n: Int[np.ndarray, " n"]) -> np.ndarray:
        scales_nR = self._read(lambda segment: segment.scales[level], positions_n)[:, :vectors]
        if np.abs(scales_nR).max(initial=0) > LARGEST_SCALE:
            folder = self.segments[0].folder.parent
            raise UserError(f"{folder}: a scale is above {LARGEST_SCALE:g}; expected those of unit vectors; build the index again")
        return scales_nR

    def _read_prefix_scales(self, level: int, vectors: int, positions_n: Int[np.ndarray, " n"], width: int) -> np.ndarray:
        """Return the factors that make unit vectors of stored numbers, which are cut; scales of int8 are part of them."""
        prefix_nRd = self._read_vectors(level, vectors, positions_n, width).astype(np.float32)
        scales_nR = self._read_scales(level, vectors, positions_n) if self._has_scales else np.float32(1)
        with np.errstate(over="ignore", invalid="ignore"):  # the search refuses scores that are not finite
            return scales_nR / np.sqrt((prefix_nRd * prefix_nRd).sum(2) * scales_nR**2 + np.float32(SQUARED_LENGTH))

    def _write_counts(self, shard_Tn: np.ndarray, positions_n: Int[np.ndarray, " n"]) -> None:
        shard_Tn.reshape(-1)[: len(positions_n)] = self._read(lambda segment: segment.counts, positions_n)

    def mask(self, is_candidate_n: Bool[np.ndarray, " n"], tiles: int) -> jax.Array:
        """Return `Tiles.is_candidate` of consecutive documents; False for padding."""
        padded = np.zeros((tiles, TILE), bool)
        padded.reshape(-1)[: len(is_candidate_n)] = is_candidate_n
        return jax.make_array_from_callback(padded.shape, self._split, lambda index: padded[index])

    def bytes_on_device(self, documents: int, vectors: int) -> int:
        """Return the bytes of so many documents on a device."""
        vector_bytes = self._width * self.dtype.itemsize + 4 * self._has_scales
        return count_tiles(documents, self.mesh.size) // self.mesh.size * TILE * (vectors * vector_bytes + 5)

    def release(self) -> None:
        """Release the memory that the files fill."""
        for segment in self.segments:
            segment.release()

    def _put(self, shape: tuple[int, ...], dtype, positions_n: np.ndarray, write: Callable, numbers: int) -> jax.Array:
        """Return an array over the devices. `write` fills some tiles of a shard at a time; one shard is in memory.

        Args:
          numbers: the most that `write` reads of a document.
        """
        arrays, size = [], max(READ_NUMBERS // (numbers * TILE), 1)
        for device, index in self._split.addressable_devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(shape[0])  # pyright: ignore[reportOptionalSubscript] this device has a shard
            shard = _aligned_zeros((stop - start, *shape[1:]), np.dtype(dtype))
            for tile in range(start, stop, size):
                rows = positions_n[tile * TILE : min(tile + size, stop) * TILE]
                if len(rows):
                    write(shard[tile - start : tile - start + size], rows)
                    self.release()
            arrays.append(jax.device_put(shard, device))
        return jax.make_array_from_single_device_arrays(shape, self._split, arrays)

    def _read(self, pick: Callable[[SegmentFiles], ChecksummedFile], positions_n: np.ndarray) -> np.ndarray:
        """Return the rows at ascending positions from a file of each segment, without a copy if they are contiguous."""
        bounds = np.searchsorted(positions_n, self.starts)
        arrays = []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            rows = positions_n[bounds[number] : bounds[number + 1]] - self.starts[number]
            file = pick(self.segments[number])
            is_contiguous = rows[-1] - rows[0] == len(rows) - 1
            arrays.append(file.read(rows[0], rows[0] + len(rows)) if is_contiguous else file.take(rows))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros that JAX on a CPU takes without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.zeros(size + ALIGNMENT, np.uint8)
    start = -content.ctypes.data % ALIGNMENT
    return content[start : start + size].view(dtype).reshape(shape)
