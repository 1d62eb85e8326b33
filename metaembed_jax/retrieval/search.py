"""Exact search of segments: in memory of the devices, or in blocks that are read from the files during the search.

Q queries, R vectors of a query, N documents, n documents of a block, K survivors of a stage, k results.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from metaembed_jax.devices import free_memory
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction import engine
from metaembed_jax.late_interaction.engine import TopK
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.sizes import ceil_power, floor_power
from metaembed_jax.late_interaction.stages import Stage, Stages
from metaembed_jax.late_interaction.tiles import TILE, Tiles, count_tiles
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.tile_reader import TileReader
from metaembed_jax.sharding import put_replicated

Residence = bool | Literal["auto"]
Block = TypeVar("Block")
BLOCK_NUMBERS = 2**22  # of the vectors of a device's block
SURVIVOR_NUMBERS = 2**24  # of the vectors of survivors that a device takes at once
QUERY_VECTORS = 4096  # of the queries that are searched for at once
SCORES = 2**22  # in the memory of a device at once
PROGRAM_SEGMENTS = 4  # of one program; more are searched one after another, so that few programs are compiled
SPARSE = 4  # documents for each candidate, above which the candidates are read alone
MEMORY_SHARE = 0.8  # of the free memory, which a resident index may fill


class Searcher:
    """Segments, and the devices that search them. The position of a document is its index among all, including deleted ones.

    Args:
      segments: segments in the order of their items.
      levels: numbers of vectors at which the levels end.
      width: numbers of a vector, D.
      mesh: devices that score.
      resident: keep all vectors in the memory of the devices; "auto" does so if they fit.
      loaded: the tiles of segments that are in the memory already, by name.

    Raises:
      UserError: `resident` is True and the vectors do not fit.
    """

    def __init__(
        self,
        segments: Sequence[SegmentFiles],
        levels: Sequence[int],
        width: int,
        mesh: Mesh,
        resident: Residence = False,
        loaded: dict[str, Tiles] | None = None,
    ):
        self.segments, self.levels, self.width, self.mesh = segments, tuple(levels), width, mesh
        self._reader = TileReader(segments, levels, width, mesh)
        self.starts = self._reader.starts
        self.loaded = self._load(resident, loaded or {})

    @functools.cached_property
    def is_alive(self) -> Bool[np.ndarray, " N"]:
        """Mask of the documents that are not deleted."""
        return np.concatenate([np.zeros(0, bool), *(segment.is_alive for segment in self.segments)])

    def search(
        self, query_QRD: Float[np.ndarray, "Q R D"], k: int, stages: Stages, is_candidate_N: Bool[np.ndarray, " N"] | None = None
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return scores, float32, and positions of the k best documents of each query, best first; of ties, the first position.

        Args:
          k: at most the survivors of every stage. With fewer candidates, the results have fewer columns.
          stages: from `as_stages`.
          is_candidate_N: mask of the documents to search in; all that are not deleted by default.
        """
        is_searched_N = self.is_alive if is_candidate_N is None else is_candidate_N & self.is_alive
        k = min(k, int(is_searched_N.sum()))
        if k == 0 or not len(query_QRD):
            return np.zeros((len(query_QRD), k), np.float32), np.zeros((len(query_QRD), k), np.int32)
        stages = tuple(Stage(budget, min(survivors, int(self.starts[-1]))) for budget, survivors in stages)
        vectors, most = max(stage.budget.query for stage in stages), max(ceil_power(k), *(stage.survivors for stage in stages))
        scored = max(most, min(engine.MERGED_DOCUMENTS, int(self.starts[-1])))  # scores of a query in memory
        at_once = floor_power(min(QUERY_VECTORS // vectors, SCORES // scored))
        results = []
        for start in range(0, len(query_QRD), at_once):
            query_qRD = query_QRD[start : start + at_once]
            padding = [(0, ceil_power(len(query_qRD)) - len(query_qRD)), (0, 0), (0, 0)]
            queries = [put_replicated(x, self.mesh) for x in engine.stage_queries(np.pad(query_qRD, padding), stages)]
            top = self._search(tuple(queries), ceil_power(k), stages, is_searched_N)
            results.append([np.asarray(x)[: len(query_qRD), :k] for x in top])
        scores_Qk, positions_Qk = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        if not np.isfinite(scores_Qk).all():  # items that passed `ingest` have vectors
            folder = self.segments[0].folder.parent
            raise UserError(f"{folder}: an item has no vectors; build the index again")
        return scores_Qk, positions_Qk

    def score(
        self, query_QRD: Float[np.ndarray, "Q R D"], positions_QK: Int[np.ndarray, "Q K"], budget: Budget
    ) -> Float[np.ndarray, "Q K"]:
        """Return the scores of some documents of each query, float32.

        Args:
          positions_QK: ascending positions of documents that are not deleted.
        """
        at_once, results = floor_power(QUERY_VECTORS // budget.query), [np.zeros((0, positions_QK.shape[1]), np.float32)]
        for start in range(0, len(query_QRD), at_once):
            query_qRD, positions_qK = (x[start : start + at_once] for x in (query_QRD, positions_QK))
            padding = ceil_power(len(query_qRD)) - len(query_qRD)
            (query,) = engine.stage_queries(np.pad(query_qRD, [(0, padding), (0, 0), (0, 0)]), (Stage(budget),))
            positions = np.pad(positions_qK, [(0, padding), (0, 0)], constant_values=-1).astype(np.int32)
            query, positions = (put_replicated(x, self.mesh) for x in (query, positions))
            scores = jax.numpy.full(positions.shape, -np.inf)
            for tiles, rows in self._survivors(positions, self.is_alive, budget.document, budget.numbers(self.width)):
                scores = jax.numpy.maximum(scores, engine.score_survivors(query, tiles, rows, budget.document, self.mesh))
            results.append(np.asarray(scores)[: len(query_qRD)])
        return np.concatenate(results)

    def _load(self, resident: Residence, loaded: dict[str, Tiles]) -> dict[str, Tiles]:
        """Return the tiles of all segments in the memory of the devices, by name; none if the index is not resident."""
        missing = [segment for segment in self.segments if segment.entry.name not in loaded]
        needed = sum(self._reader.bytes_on_device(len(segment), self.levels[-1]) for segment in missing)
        if not resident or not self._fits(needed, resident):
            return {}
        tiles = {}
        for segment, start in zip(self.segments, self.starts, strict=False):
            name, count = segment.entry.name, count_tiles(len(segment), self.mesh.size)
            if name in loaded:
                first = put_replicated(np.asarray(start, np.int32), self.mesh)
                tiles[name] = loaded[name]._replace(is_candidate=self._reader.mask(segment.is_alive, count), first=first)
                continue
            rows = np.arange(start, start + len(segment), dtype=np.int32)
            tiles[name] = self._reader.read(rows, count, self.levels[-1], self.width, start)
            tiles[name] = tiles[name]._replace(is_candidate=self._reader.mask(segment.is_alive, count))
        return tiles

    def _fits(self, needed: int, resident: Residence) -> bool:
        free = free_memory(self.mesh)
        if needed <= MEMORY_SHARE * free:
            return True
        if resident == "auto":
            return False
        raise UserError(
            f"{self.segments[0].folder.parent}: resident=True: its vectors take {needed:,} bytes on a device, of which {free:,} "
            f'are free; expected at most {MEMORY_SHARE:.0%} of them: load it with resident="auto", with more devices, or as int8'
        )

    def _search(self, queries: tuple[jax.Array, ...], k: int, stages: Stages, is_searched_N: np.ndarray) -> TopK:
        if self.loaded and len(self.segments) <= PROGRAM_SEGMENTS:
            widths = {budget.numbers(self.width) for budget, _ in stages}
            return engine.search(queries, tuple(self._resident(is_searched_N, widths)), stages, k, self.mesh)
        top = engine.empty_top_k(len(queries[0]), 0)
        for number, (query_QRD, (budget, survivors)) in enumerate(zip(queries, stages, strict=True)):
            vectors, width, count = budget.document, budget.numbers(self.width), survivors or k
            if number == 0:
                top = TopK(*(put_replicated(np.asarray(x), self.mesh) for x in engine.empty_top_k(len(query_QRD), count)))
                sparse_n = None if self.loaded else _sparse_positions(is_searched_N)
                resident = self._resident(is_searched_N, {width})
                for tiles in resident if self.loaded else self._blocks(is_searched_N, sparse_n, vectors, width):
                    jax.block_until_ready(top)  # otherwise blocks pile up in memory when reading is faster than scoring
                    top = engine.merge_tiles(query_QRD, tiles, top, vectors, self.mesh)
                if sparse_n is not None:
                    numbers_QK = np.asarray(top.positions)
                    top = TopK(top.scores, put_replicated(np.where(numbers_QK < 0, -1, sparse_n[numbers_QK]), self.mesh))
            else:
                positions_QK = engine.in_order(top.positions)
                scores_QK = jax.numpy.full_like(top.scores, -np.inf)
                for tiles, rows_QK in self._survivors(positions_QK, is_searched_N, vectors, width):
                    scores = engine.score_survivors(query_QRD, tiles, rows_QK, vectors, self.mesh)
                    scores_QK = jax.numpy.maximum(scores_QK, scores)
                top = engine.best_of(scores_QK, positions_QK, count)
        return top

    def _resident(self, is_searched_N: np.ndarray, widths: set[int]) -> Iterator[Tiles]:
        """Yield the resident segments, with these candidates and the scales of these widths."""
        for number, (name, tiles) in enumerate(list(self.loaded.items())):
            start, stop = self.starts[number : number + 2]
            count = tiles.is_candidate.shape[0]
            for width in widths - {self.width, *tiles.prefixes}:
                rows = np.arange(start, stop, dtype=np.int32)
                scales = self._reader.read_scales(rows, count, self.levels[-1], width)
                tiles = self.loaded[name] = tiles._replace(prefixes=tiles.prefixes | {width: scales})
            if is_searched_N is not self.is_alive:
                tiles = tiles._replace(is_candidate=self._reader.mask(is_searched_N[start:stop], count))
            yield tiles._replace(prefixes={width: scales for width, scales in tiles.prefixes.items() if width in widths})

    def _blocks(self, is_searched_N: np.ndarray, sparse_n: np.ndarray | None, vectors: int, width: int) -> Iterator[Tiles]:
        """Yield all blocks with a candidate. The last blocks are smaller by powers of two, so that few programs are compiled.

        Args:
          sparse_n: positions of the candidates, to read them alone; the tiles then have indices of this array as positions.
        """
        if sparse_n is not None:
            is_searched_N = np.ones(len(sparse_n), bool)
        documents, step = len(is_searched_N), engine.step_tiles(self.mesh, vectors, TILE)
        most = step * max(BLOCK_NUMBERS // (step * TILE * vectors * width), 1) * self.mesh.size * TILE

        def read(start: int) -> Tiles:
            stop = min(start + most, documents)
            count = self._count_tiles(stop - start)
            positions = np.arange(start, stop, dtype=np.int32) if sparse_n is None else sparse_n[start:stop]
            tiles = self._reader.read(positions, count, vectors, width, start)
            return tiles._replace(is_candidate=self._reader.mask(is_searched_N[start:stop], count))

        starts = [start for start in range(0, documents, most) if is_searched_N[start : start + most].any()]
        return _read_ahead(read, starts)

    def _count_tiles(self, documents: int) -> int:
        """Return the number of tiles for some documents: a power of two on each device, so that few programs are compiled."""
        devices = self.mesh.size
        return ceil_power(count_tiles(documents, devices) // devices) * devices

    def _survivors(
        self, positions_QK: jax.Array, is_searched_N: np.ndarray, vectors: int, width: int
    ) -> Iterable[tuple[Tiles, jax.Array]]:
        """Yield tiles that have the survivors, and the position of each survivor in them."""
        if self.loaded:
            return ((tiles, positions_QK) for tiles in self._resident(is_searched_N, {width}))
        positions = np.asarray(positions_QK)
        union = np.unique(positions[positions >= 0])
        rows_QK = np.where(positions < 0, -1, np.searchsorted(union, positions)).astype(np.int32)
        rows_QK = put_replicated(rows_QK, self.mesh)
        most = max(SURVIVOR_NUMBERS // (TILE * vectors * width), 1) * TILE * self.mesh.size

        def read(start: int) -> tuple[Tiles, jax.Array]:
            rows = union[start : start + most]
            return self._reader.read(rows, self._count_tiles(len(rows)), vectors, width, start), rows_QK

        return _read_ahead(read, range(0, len(union), most))


def _read_ahead(read: Callable[[int], Block], starts: Iterable[int]) -> Iterator[Block]:
    """Yield the block that `read` returns for each start, and read the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for start in starts:
            ahead, ready = thread.submit(read, start), ahead
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def _sparse_positions(is_searched_N: np.ndarray) -> np.ndarray | None:
    """Return the positions of the candidates if they are few, int32; None if whole blocks are read faster."""
    return np.flatnonzero(is_searched_N).astype(np.int32) if is_searched_N.sum() * SPARSE < len(is_searched_N) else None
