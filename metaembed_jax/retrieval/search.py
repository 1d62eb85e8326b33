"""Exact search of segments: every candidate in the first stage, the survivors of each query in later ones.

Candidates are read from the files in blocks, when it is their turn, and sent to the devices of a mesh: each device scores its part
of a block. Two blocks are held at a time, so the memory that a search takes does not grow with the index.

Q queries, R vectors of a query, D width of a vector, N candidates, n of a block, K that survived, k that are kept.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction import levels
from metaembed_jax.late_interaction.levels import Block, merge_block, no_best
from metaembed_jax.late_interaction.stages import Stages
from metaembed_jax.retrieval.checked import CheckedFile
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.sharding import put_replicated

# Of candidates that are scored at once on a device: similarities, numbers in their vectors, and how many may always be.
PART_SIMILARITIES, PART_NUMBERS, PART_ITEMS = 2**20, 2**22, 1024
BLOCK_NUMBERS = 2**22  # of candidates that are sent to a device at once
QUERY_ROWS = 1024  # vectors of queries that are searched for at once
RELEASED = 4  # blocks, after which the memory that files have filled is given back
SCORES = 2**22  # at once, of a block, or of candidates that are kept


class Searched:
    """Segments, and the devices that search them. An item's position is its place among all, in their order.

    Args:
      segments: in the order of their items.
      levels: after which vectors the levels end.
      width: of a vector, D.
      mesh: all devices that score.
    """

    def __init__(self, segments: Sequence[SegmentFiles], levels: Sequence[int], width: int, mesh: Mesh):
        self.segments, self.levels, self.width, self.mesh = segments, tuple(levels), width, mesh
        self.starts = np.cumsum([0, *map(len, segments)])
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @functools.cached_property
    def is_alive(self) -> Bool[np.ndarray, " N"]:
        """Which items are not deleted."""
        return np.concatenate([np.zeros(0, bool), *(segment.is_alive for segment in self.segments)])

    def find(
        self, query_QRD: Float[np.ndarray, "Q R D"], k: int, stages: Stages
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Scores, float32, and positions of the best candidates of each query, best first; of ties, the first position.

        Args:
          k: at most as many as there are, and as survive every stage.
          stages: of `as_stages`.
        """
        vectors, kept = max(stage[0] for stage in stages), max([k, *(stage[2] for stage in stages[:-1])])
        at_once = _floor(min(QUERY_ROWS // vectors, SCORES // min(kept, self.starts[-1])))
        parts = [self._find(query_QRD[start : start + at_once], k, stages) for start in range(0, len(query_QRD), at_once)]
        none = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        return tuple(np.concatenate(part) for part in zip(none, *parts, strict=True))

    def place(self, position: int) -> tuple[SegmentFiles, int]:
        """The segment of an item, and its row there."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.segments[number], int(position - self.starts[number])

    def _find(self, query_QRD: np.ndarray, k: int, stages: Stages) -> tuple[np.ndarray, np.ndarray]:
        survivors_QK = None
        for query_vectors, candidate_vectors, *survivors in stages:
            keep = min(survivors[0], self.is_alive.sum()) if survivors else k
            asked = query_QRD[:, :query_vectors]
            if survivors_QK is None:
                everything = np.arange(self.starts[-1], dtype=np.int32)
                scores, positions = self._best(asked, candidate_vectors, keep, everything)
            else:
                found = [self._best(asked[q : q + 1], candidate_vectors, keep, survivors_QK[q]) for q in range(len(asked))]
                scores, positions = (np.concatenate(part) for part in zip(*found, strict=True))
            survivors_QK = np.sort(positions, axis=1)  # so that the first position wins ties in the next stage too
            self._release()
        return scores, positions

    def _best(self, query_QRD: np.ndarray, vectors: int, k: int, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions [Q, k] of the best of some candidates by so many vectors of each.

        Queries, k and the last block are filled up to powers of two, so that few programs are compiled.
        """
        queries, rows = len(query_QRD), min(_ceil(len(query_QRD)) * query_QRD.shape[1], levels.QUERY_ROWS)
        query_QRD = put_replicated(np.pad(query_QRD, [(0, _ceil(queries) - queries), (0, 0), (0, 0)]), self.mesh)
        best = jax.tree.map(lambda x: put_replicated(np.asarray(x), self.mesh), no_best(len(query_QRD), _ceil(k)))
        numbers = vectors * self.width
        # It follows the number of candidates, not that of devices, so that the scores are the same bits on any mesh.
        fair = min(_ceil(len(positions_N)), max(_ceil(len(positions_N)) // 8, PART_ITEMS))
        part = _floor(min(PART_SIMILARITIES // (rows * vectors), PART_NUMBERS // numbers, fair))
        parts = _floor(min(BLOCK_NUMBERS // (part * numbers), SCORES // (part * len(query_QRD))))
        for block in self._blocks(positions_N, part * self.mesh.size, parts, vectors):
            jax.block_until_ready(best)  # else blocks pile up where reading is faster than scoring
            best = merge_block(query_QRD, block, best, part, self.mesh)
        scores_Qk, positions_Qk = (np.asarray(x)[:queries, :k].copy() for x in best)
        if not np.isfinite(scores_Qk).all():  # nothing that was checked when it was added scores so
            folder = self.segments[0].folder.parent
            raise UserError(f"{folder}: an item has no vectors, or NaN or infinities in them; build the index again")
        return scores_Qk, positions_Qk

    def _blocks(self, positions_N: np.ndarray, step: int, steps: int, vectors: int) -> Iterator[Block]:
        """Blocks of 1, 2, 4 .. `steps` times `step` candidates."""
        for number, start in enumerate(range(0, len(positions_N), step * steps), 1):
            positions_n = positions_N[start : start + step * steps]
            yield self._block(positions_n, step * _ceil(-(-len(positions_n) // step)), vectors)
            if number % RELEASED == 0:
                self._release()

    def _release(self) -> None:
        for segment in self.segments:
            segment.release()

    def _block(self, positions_n: np.ndarray, size: int, vectors: int) -> Block:
        def put(row: tuple[int, ...], read: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(size)
                found = read(positions_n[start:stop])
                if len(found) == stop - start:
                    return found
                filled = np.full((stop - start, *row), -1, found.dtype)
                filled[: len(found)] = found
                return filled

            return jax.make_array_from_callback((size, *row), self._split, part)

        def of_files(row: tuple[int, ...], pick: Callable[[SegmentFiles], CheckedFile]) -> jax.Array:
            return put(row, lambda positions: self._read(pick, positions)[:, : row[0]] if row else self._read(pick, positions))

        starts = [start for start in (0, *self.levels[:-1]) if start < vectors]
        widths = [min(end, vectors) - start for start, end in zip(starts, self.levels, strict=False)]
        is_ragged = vectors > min(segment.about.fewest for segment in self.segments)
        has_scales = bool(self.segments[0].scales)
        return Block(
            put((), lambda positions: np.where(self.is_alive[positions], positions, -1)),
            of_files((), lambda segment: segment.counts) if is_ragged else None,
            tuple(of_files((w, self.width), lambda segment, n=n: segment.levels[n]) for n, w in enumerate(widths)),
            tuple(of_files((w,), lambda segment, n=n: segment.scales[n]) for n, w in enumerate(widths)) if has_scales else (),
        )

    def _read(self, pick: Callable[[SegmentFiles], CheckedFile], positions_n: np.ndarray) -> np.ndarray:
        """The rows of a file of each segment at ascending positions; in place, where they lie in a row in one segment."""
        bounds = np.searchsorted(positions_n, self.starts)
        bounds[-1] = len(positions_n)
        numbers = np.flatnonzero(np.diff(bounds))
        parts = []
        for number in numbers if len(numbers) else (0,):
            rows = positions_n[bounds[number] : bounds[number + 1]] - self.starts[number]
            file = pick(self.segments[number])
            in_a_row = len(rows) == 0 or rows[-1] - rows[0] == len(rows) - 1
            first = rows[0] if len(rows) else 0
            parts.append(file.read(first, first + len(rows)) if in_a_row else file.take(rows))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def survivors(
    searched: Searched, query_QRD: Float[np.ndarray, "Q R D"], first: Stages, wanted: Stages, k: int, recall: float
) -> int:
    """How many must survive a first stage, so that of the k best that are wanted so many are among them, over all queries.

    Args:
      first: the first stage, of `as_stages`.
      wanted: the second stage, of `as_stages`.
      recall: a share of the Q * k best.
    """
    alive, enough = int(searched.is_alive.sum()), math.ceil(recall * len(query_QRD) * k - 1e-9)
    _, best_Qk = searched.find(query_QRD, k, wanted)
    looked_at = k
    while True:
        _, ranked_QK = searched.find(query_QRD, looked_at, first)
        places = np.concatenate([np.flatnonzero(np.isin(*pair)) for pair in zip(ranked_QK, best_Qk, strict=True)])
        if len(places) >= enough:
            return max(int(np.sort(places)[enough - 1]) + 1, k)
        looked_at = min(2 * looked_at, alive)


def _floor(number: int) -> int:
    """The largest power of two that is not larger; 1 at least."""
    return 1 << max(int(number), 1).bit_length() - 1


def _ceil(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (int(number) - 1).bit_length()
