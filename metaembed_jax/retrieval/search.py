"""Exact search of segments. The first stage scores every document, later stages score the survivors of each query.

Documents are read from the files in blocks, which are sharded over the devices of a mesh. Two blocks are in memory at a time, so
the memory of a search does not grow with the index.

Q queries, R vectors of a query, D width of a vector, N documents, n documents of a block, K survivors of a stage, k results.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction import level_scoring
from metaembed_jax.late_interaction.level_scoring import Block, empty_top_k, merge_block
from metaembed_jax.late_interaction.stages import Stages
from metaembed_jax.retrieval.checksummed_files import ChecksummedFile
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.sharding import put_replicated

# A device scores a block in steps. The most similarities, numbers of document vectors, and documents of a step. A large index has
# more documents in a step.
STEP_SIMILARITIES, STEP_NUMBERS, STEP_DOCUMENTS = 2**20, 2**22, 1024
BLOCK_NUMBERS = 2**22  # numbers of a device's documents in a block
SEARCH_VECTORS = 1024  # query vectors that are searched for at once
BLOCKS_BEFORE_RELEASE = 4  # blocks that are read before the memory of the files is released
SCORES = 2**22  # scores of a block, or of survivors, that are in memory at once


class SegmentSearcher:
    """Segments, and the devices that search them. The position of a document is its index among all, including deleted ones.

    Args:
      segments: segments in the order of their items.
      levels: numbers of vectors at which the levels end.
      width: numbers of a vector, D.
      mesh: devices that score.
    """

    def __init__(self, segments: Sequence[SegmentFiles], levels: Sequence[int], width: int, mesh: Mesh):
        self.segments, self.levels, self.width, self.mesh = segments, tuple(levels), width, mesh
        self.starts = np.cumsum([0, *map(len, segments)])
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @functools.cached_property
    def is_alive(self) -> Bool[np.ndarray, " N"]:
        """Mask of the documents that are not deleted."""
        return np.concatenate([np.zeros(0, bool), *(segment.is_alive for segment in self.segments)])

    def search(
        self, query_QRD: Float[np.ndarray, "Q R D"], k: int, stages: Stages, is_candidate_N: Bool[np.ndarray, " N"] | None = None
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return scores, float32, and positions of the k best documents of each query, best first; of ties, the first position.

        Args:
          k: at most the number of documents, and at most the survivors of every stage.
          stages: from `as_stages`.
          is_candidate_N: mask of the documents to search in; all that are not deleted by default.
        """
        vectors, survivors = max(stage[0] for stage in stages), max([k, *(stage[2] for stage in stages[:-1])])
        at_once = _floor(min(SEARCH_VECTORS // vectors, SCORES // min(survivors, self.starts[-1])))
        all_N = np.arange(self.starts[-1], dtype=np.int32)
        candidates_n = all_N if is_candidate_N is None else all_N[is_candidate_N & self.is_alive]
        results = [
            self._search(query_QRD[start : start + at_once], k, stages, candidates_n) for start in range(0, len(query_QRD), at_once)
        ]
        empty = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        scores_Qk, positions_Qk = (np.concatenate(arrays) for arrays in zip(empty, *results, strict=True))
        return scores_Qk, positions_Qk

    def _search(self, query_QRD: np.ndarray, k: int, stages: Stages, candidates_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        survivors_QK, most = None, min(len(candidates_n), self.is_alive.sum())
        for query_vectors, document_vectors, *survivors in stages:
            count = min(survivors[0], most) if survivors else k
            query_QrD = query_QRD[:, :query_vectors]
            if survivors_QK is None:
                scores, positions = self._top_k(query_QrD, document_vectors, count, candidates_n)
            else:
                results = [
                    self._top_k(query_QrD[q : q + 1], document_vectors, count, survivors_QK[q]) for q in range(len(query_QrD))
                ]
                scores, positions = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
            survivors_QK = np.sort(positions, axis=1)  # so that the first position wins ties in the next stage too
            self._release()
        return scores, positions

    def _top_k(self, query_QRD: np.ndarray, vectors: int, k: int, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and positions [Q, k] of the best documents among some positions, by the first `vectors` of each document.

        Queries, k and the last block are padded to powers of two, so that few programs are compiled.
        """
        queries, rows = len(query_QRD), min(_ceil(len(query_QRD)) * query_QRD.shape[1], level_scoring.QUERY_VECTORS)
        padded_QRD = put_replicated(np.pad(query_QRD, [(0, _ceil(queries) - queries), (0, 0), (0, 0)]), self.mesh)
        top = jax.tree.map(lambda x: put_replicated(np.asarray(x), self.mesh), empty_top_k(len(padded_QRD), _ceil(k)))
        numbers = vectors * self.width
        # A step depends on the number of documents, not of devices, so the scores are the same bits on any mesh.
        limit = min(_ceil(len(positions_N)), max(_ceil(len(positions_N)) // 8, STEP_DOCUMENTS))
        step = _floor(min(STEP_SIMILARITIES // (rows * vectors), STEP_NUMBERS // numbers, limit))
        steps = _floor(min(BLOCK_NUMBERS // (step * numbers), SCORES // (step * len(padded_QRD))))
        for block in self._blocks(positions_N, step * self.mesh.size, steps, vectors):
            jax.block_until_ready(top)  # otherwise blocks pile up in memory when reading is faster than scoring
            top = merge_block(padded_QRD, block, top, step, self.mesh)
        scores_Qk, positions_Qk = (np.asarray(x)[:queries, :k].copy() for x in top)
        if not np.isfinite(scores_Qk).all():  # items that passed `ingest` have finite scores
            folder = self.segments[0].folder.parent
            raise UserError(f"{folder}: an item has no vectors, or NaN or infinities in them; build the index again")
        return scores_Qk, positions_Qk

    def _blocks(self, positions_N: np.ndarray, step: int, steps: int, vectors: int) -> Iterator[Block]:
        """Yield blocks of `steps` times `step` documents; the last block may have half, a quarter, ... of the steps."""
        for number, start in enumerate(range(0, len(positions_N), step * steps), 1):
            positions_n = positions_N[start : start + step * steps]
            yield self._block(positions_n, step * _ceil(-(-len(positions_n) // step)), vectors)
            if number % BLOCKS_BEFORE_RELEASE == 0:
                self._release()

    def _release(self) -> None:
        for segment in self.segments:
            segment.release()

    def _block(self, positions_n: np.ndarray, size: int, vectors: int) -> Block:
        def put(row: tuple[int, ...], read: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
            def read_shard(index) -> np.ndarray:
                start, stop, _ = index[0].indices(size)
                rows = read(positions_n[start:stop])
                if len(rows) == stop - start:
                    return rows
                padded = np.full((stop - start, *row), -1, rows.dtype)
                padded[: len(rows)] = rows
                return padded

            return jax.make_array_from_callback((size, *row), self._split, read_shard)

        def put_files(row: tuple[int, ...], pick: Callable[[SegmentFiles], ChecksummedFile]) -> jax.Array:
            return put(row, lambda positions: self._read(pick, positions)[:, : row[0]] if row else self._read(pick, positions))

        starts = [start for start in (0, *self.levels[:-1]) if start < vectors]
        widths = [min(end, vectors) - start for start, end in zip(starts, self.levels, strict=False)]
        is_ragged = vectors > min(segment.entry.fewest for segment in self.segments)
        has_scales = bool(self.segments[0].scales)
        return Block(
            put((), lambda positions: np.where(self.is_alive[positions], positions, -1)),
            put_files((), lambda segment: segment.counts) if is_ragged else None,
            tuple(put_files((w, self.width), lambda segment, n=n: segment.levels[n]) for n, w in enumerate(widths)),
            tuple(put_files((w,), lambda segment, n=n: segment.scales[n]) for n, w in enumerate(widths)) if has_scales else (),
        )

    def _read(self, pick: Callable[[SegmentFiles], ChecksummedFile], positions_n: np.ndarray) -> np.ndarray:
        """Return the rows at ascending positions from a file of each segment, without a copy if they are contiguous."""
        bounds = np.searchsorted(positions_n, self.starts)
        bounds[-1] = len(positions_n)
        arrays = []
        for number in np.flatnonzero(np.diff(bounds)).tolist() or [0]:
            rows = positions_n[bounds[number] : bounds[number + 1]] - self.starts[number]
            file = pick(self.segments[number])
            is_contiguous = len(rows) == 0 or rows[-1] - rows[0] == len(rows) - 1
            first = rows[0] if len(rows) else 0
            arrays.append(file.read(first, first + len(rows)) if is_contiguous else file.take(rows))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _floor(number: int) -> int:
    """Return the largest power of two that is at most a number; at least 1."""
    return 1 << max(int(number), 1).bit_length() - 1


def _ceil(number: int) -> int:
    """Return the smallest power of two that is at least a number."""
    return 1 << (int(number) - 1).bit_length()
