"""An index: documents on disk, searched exactly at any budget.

index = me.Index.build(d, ids=["a", "b"])  # then index.save("INDEX"), me.Index.load("INDEX")
scores, ids = index.search(q, k=10, budget=[(1, 1, 1000), (16, 64)])
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from metaembed_jax import hosts
from metaembed_jax.data.left_out import LeftOut
from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path
from metaembed_jax.late_interaction.groups import Budget, validate_budget
from metaembed_jax.late_interaction.stages import Stage, Stages
from metaembed_jax.late_interaction.tiles import Tiles
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.calibration import calibrate, calibrated_stages, with_calibration
from metaembed_jax.retrieval.certified import check_certifiable, search_certified
from metaembed_jax.retrieval.hits import Hits, make_hits
from metaembed_jax.retrieval.ingest import as_blocks, as_ids, make_items, most_vectors
from metaembed_jax.retrieval.manifest import Calibration, Manifest, check_types, levels_of
from metaembed_jax.retrieval.matching import match_items
from metaembed_jax.retrieval.queries import RESULTS, as_queries, count_results, stages_of
from metaembed_jax.retrieval.search import Residence, Searcher
from metaembed_jax.retrieval.segment import SegmentFiles, count_items
from metaembed_jax.retrieval.stored_items import StoredItems, read_items
from metaembed_jax.retrieval.writer import SegmentWriter, copy_segment, merge_segments, write_segment


class Index:
    """Documents by id, from `Index.build` or `Index.load`.

    An index is stored in its folder; one that is built without a path has a temporary folder. A change is on the disk when the call
    returns, and a crash leaves all of it or nothing. An index does not see what other processes change after it was loaded.
    """

    def __init__(self, folder: Path, mesh: Mesh | None = None, resident: Residence = False):
        self.folder, self._mesh = folder.absolute(), mesh  # absolute: the process may change its folder
        self._resident: Residence = resident
        self._loaded, self._lock = dict[str, Tiles](), threading.Lock()
        self._take(*store.open_index(folder))

    @classmethod
    def build(
        cls,
        vectors: np.ndarray | Array | Sequence[np.ndarray] | Iterable[tuple],
        ids: Iterable[str] | None = None,
        *,
        metadata: Sequence[dict | None] | None = None,
        budget: int | None = None,
        dtype: str = "bfloat16",
        exact: str | None = None,
        path: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
    ) -> "Index":
        """Build an index of vectors.

        Args:
          vectors: unit vectors [N, R, D], a list of [R_n, D] (any number of vectors an item), or an iterator of blocks of either:
            (ids, vectors) or (ids, vectors, metadata). One block of an iterator is in memory at a time.
          ids: a text for each item, all different; the numbers from 0 by default.
          metadata: a dict of JSON values for each item.
          budget: vectors of each item to keep, from the first. An iterator needs it if items of later blocks have more vectors than
            those of the first block.
          dtype: type of the vectors on disk: "bfloat16"; "float32"; or "int8", with a float32 scale for each vector
            (`ingest.to_int8`).
          exact: "float32" or "bfloat16": an index of int8 also stores the vectors in this type, and the error of each, for
            `search(..., certified=True)`. Other searches do not read them.
          path: the folder of the index; an index in it is replaced when the new one is complete.
          mesh: devices that search the index; all by default.

        Raises:
          UserError: there is no item, or an item is wrong, which the error names.
        """
        check_types(dtype, exact)
        if budget is not None and (type(budget) is not int or budget < 1):
            raise UserError(f"budget={budget!r}: expected a positive number of vectors to keep of each item")
        blocks = (make_items(array, items, fields, budget) for items, array, fields in as_blocks(vectors, ids, metadata))
        first = next((block for block in blocks if block.ids), None)
        if first is None:
            raise UserError("nothing to index: expected at least one item")
        _, count, width = first.vectors_NRD.shape
        empty = Manifest(width, levels_of(budget or max(count, most_vectors(vectors))), dtype, exact=exact)
        return _create(
            path, mesh, lambda folder: dataclasses.replace(empty, segments=(write_segment(folder, empty, first, blocks),))
        )

    @classmethod
    def load(cls, path: str | os.PathLike, *, mesh: Mesh | None = None, resident: Residence = False) -> "Index":
        """Load the index of a folder. Vectors are read and checked when they are first searched; `verify` checks all files.

        Args:
          mesh: devices that search; all by default.
          resident: False reads the vectors from the files in every search. True reads them once, in the first search, and keeps
            them in the memory of the devices, in their stored type (on a CPU in float32). "auto" does so if they fit.

        Raises:
          UserError: the folder is not an index, or the index is damaged.
        """
        if not (isinstance(resident, bool) or resident == "auto"):
            raise UserError(f'resident={resident!r}: expected True, False or "auto"')
        return cls(local_path(path), mesh, resident)

    def save(self, path: str | os.PathLike) -> None:
        """Copy the index to a folder; an index in it is replaced when the copy is complete.

        Raises:
          UserError: the folder holds something else, another process is writing to it, or this index is damaged.
        """
        folder = local_path(path)
        if folder.resolve() == self.folder.resolve():
            return
        with store.changing(folder):
            segments = tuple(copy_segment(folder, segment) for segment in self._segments)
            store.commit(folder, dataclasses.replace(self._manifest, segments=segments))

    def search(
        self,
        query_QRD: Float[np.ndarray, "Q R D"],
        k: int | None = None,
        budget: Sequence | str | None = None,
        *,
        where: Mapping | None = None,
        certified: bool = False,
    ) -> Hits:
        """Return the k best items of each query: their MaxSim scores and ids, and on demand their metadata.

        `scores, ids = index.search(q)` takes the hits apart. Items with equal scores are in the order in which they were added.

        Args:
          query_QRD: unit vectors, from `MetaEmbed.encode_query`.
          k: at most the number of items, and the survivors of each stage. By default 10, or as many as those allow.
          budget: (r_q, r_c), the vectors to use of a query and of an item, or (r_q, r_c, width), the first numbers of each; or
            stages [(r_q, r_c, survivors), ..., (r_q, r_c)] or with a width before the survivors: each stage scores the survivors of
            the stage before; or "auto", the stages of `calibrate`. All vectors by default.
          where: search only items whose metadata match, such as {"lang": "en", "page": {"$gte": 2, "$lt": 9}}; with $eq, $ne, $in,
            $nin, $gt, $gte, $lt, $lte, $and, $or and $not (`filters`). There are fewer results than k if fewer items match.
          certified: return the best items by the exact vectors of an index of int8 (`exact` of `build`), scored in float64.
            `Hits.certified` marks the queries whose items are proven to be the best. Expects a budget without stages or width.

        Raises:
          UserError: the queries or the budget do not match the stored vectors, k is not between 1 and the number of items, the
            filter is wrong, no item has a key that it names, or the index is not calibrated or has no exact vectors.
        """
        if isinstance(budget, str) and budget == "auto":
            budget = self.calibrated_stages(k)
        query_QRD, stages = self._validated(query_QRD, budget)
        searcher = self._searcher  # the state that is searched, whatever another thread changes meanwhile
        k = count_results(k, count_items(searcher.segments), stages, where is not None)
        is_match_N = None if where is None else match_items(searcher.segments, where)
        k = k if is_match_N is None else min(k, int(is_match_N.sum()))
        if certified:
            return search_certified(searcher, query_QRD, k, check_certifiable(self.folder, self._manifest, stages), is_match_N)
        return make_hits(searcher.segments, *searcher.search(query_QRD, k, stages, is_match_N))

    def calibrate(
        self,
        query_QRD: Float[np.ndarray, "Q R D"],
        first: Sequence[int],
        last: Sequence[int],
        *,
        k: int = RESULTS,
        coverage: float = 0.99,
        confidence: float = 0.95,
    ) -> Calibration:
        """Choose the number of survivors of a first stage on a sample of queries, for `search(..., budget="auto")`, and store it.

        With the given confidence, at least a share `coverage` of the queries that the sample is drawn from lose none of their k
        best items in the first stage. This holds for the present items; when the index grows, `"auto"` takes survivors in
        proportion.

        Args:
          query_QRD: queries such as are expected; 299 or more for the default coverage and confidence.
          first: (r_q, r_c) or (r_q, r_c, width) of the first stage, which scores all items.
          last: the same of the second stage.
          k: results of the searches.

        Raises:
          UserError: as `search`; or the sample is too small, or another process is writing the index.
        """
        with self._changing() if hosts.is_first() else contextlib.nullcontext():
            query_QRD, _ = self._validated(query_QRD, None)
            largest = Budget(query_QRD.shape[1], self.vectors, self.width)
            budgets = validate_budget(first, largest), validate_budget(last, largest)
            k = count_results(k, len(self), (Stage(budgets[1]),))
            calibration = calibrate(self._searcher, query_QRD, budgets, k, (coverage, confidence), len(self))
            if hosts.is_first():
                self._commit(calibrations=with_calibration(self._manifest.calibrations, calibration))
        hosts.wait_for_all("calibrated")
        if not hosts.is_first():
            self._take(*store.open_index(self.folder))
        return calibration

    def calibrated_stages(self, k: int | None = None) -> Stages:
        """Return the stages of a search for k results, by default 10, with `budget="auto"`.

        Raises:
          UserError: the index was not calibrated, or for fewer results.
        """
        return calibrated_stages(self._manifest.calibrations, min(RESULTS, len(self)) if k is None else k, len(self), self.width)

    def check_model(self, model: MetaEmbed) -> None:
        """Check that this model encoded the items.

        Raises:
          UserError: another model did, or the index does not record its model.
        """
        recorded = self._manifest.model
        if recorded is None:
            raise UserError(
                f"{self.folder} was built from vectors and does not record their model; index again with `index_documents`"
            )
        if recorded["fingerprint"] != model.fingerprint:
            models = f"{self.model or 'one'} with fingerprint {recorded['fingerprint']}; this one has {model.fingerprint}"
            raise UserError(f"{self.folder} holds vectors of another model: {models}; search with that model, or index again")

    def metadata(self, item: str) -> dict:
        """Return the metadata of an item, by its id.

        Raises:
          UserError: the index has no item with this id.
        """
        for segment in self._segments:
            for row in segment.find(as_ids([item])).values():
                return segment.metadata(row)
        raise UserError(f"{self.folder} has no item {item!r}")

    def add(self, vectors, ids: Iterable[str] | None = None, *, metadata: Sequence[dict | None] | None = None) -> None:
        """Append items, given as for `build`. Vectors of an item beyond those that the index stores are dropped.

        Raises:
          UserError: an id is given twice, or the index already has it; or as `build`.
        """
        with self._changing() as folder:
            new = SegmentWriter(folder, self._manifest)
            for block_ids, array, fields in as_blocks(vectors, ids, metadata):
                items = make_items(array, block_ids, fields, self.vectors)
                for segment in self._segments:
                    for item in segment.find(items.ids):
                        raise UserError(f"{self.folder} already has an item {item!r}; delete it first, or choose another id")
                if items.ids:
                    new.add(items)
            if new.item_count:
                self._commit(segments=(*self._manifest.segments, new.close()))

    def delete(self, ids: Iterable[str]) -> None:
        """Delete items. Their vectors stay on the disk until `compact`.

        Raises:
          UserError: the index has no item with one of the ids; then nothing is deleted.
        """
        ids = as_ids([ids] if isinstance(ids, str) else ids)
        with self._changing():
            rows_by_segment = [segment.find(ids) for segment in self._segments]
            if unknown := set(ids).difference(*rows_by_segment):
                raise UserError(f"{self.folder} has no item {min(unknown)!r}; nothing was deleted")
            segments = (
                dataclasses.replace(segment.entry, deleted=tuple(sorted({*segment.entry.deleted, *rows.values()})))
                for segment, rows in zip(self._segments, rows_by_segment, strict=True)
            )
            self._commit(segments=tuple(segments))

    def compact(self) -> None:
        """Write all items that are not deleted as one segment, which is smaller and faster to search.

        Raises:
          UserError: a file is damaged.
        """
        with self._changing() as folder:
            self._commit(segments=merge_segments(folder, self._manifest, self._segments))

    def verify(self) -> None:
        """Read and check all files.

        Raises:
          UserError: a file is damaged, which the error names.
        """
        for segment in self._segments:
            segment.check_all()

    def __len__(self) -> int:
        return count_items(self._segments)

    @property
    def model(self) -> str:
        """Path or hub id of the model that encoded the items; empty if it is unknown."""
        return (self._manifest.model or {}).get("name", "")

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that encoded the items; empty if it is unknown."""
        return (self._manifest.model or {}).get("fingerprint", "")

    @property
    def vectors(self) -> int:
        """Largest number of vectors that are stored of an item."""
        return self._manifest.levels[-1]

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self._manifest.width

    def items(self, vectors: int | None = None) -> Iterator[StoredItems]:
        """Yield the items in blocks (ids, vectors, metadata), as `build` takes them.

        Args:
          vectors: most vectors of an item to read, from the first; all by default.

        Raises:
          UserError: a file is damaged, or `vectors` is not between 1 and those that are stored.
        """
        vectors = self.vectors if vectors is None else vectors
        if type(vectors) is not int or not 1 <= vectors <= self.vectors:
            raise UserError(f"vectors={vectors!r}: expected 1 to {self.vectors}, the vectors that {self.folder} stores of an item")
        return read_items(self._segments, self._manifest.levels, vectors)

    @property
    def left_out(self) -> list[LeftOut]:
        """Documents that `index_documents` left out, (id, reason) each."""
        return [LeftOut(item, reason) for item, reason, _ in self._manifest.left_out]

    @property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Results of `calibrate`, in order."""
        return self._manifest.calibrations

    def __repr__(self) -> str:
        types = " + ".join(filter(None, (self._manifest.dtype, self._manifest.exact)))
        return f"<Index of {len(self):,} items, {self.vectors} x {self._manifest.width} {types}, in {self.folder}>"

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Path]:
        """Hold the folder's lock, and load the newest state of the index."""
        store.read_manifest(self.folder)  # a folder that was removed is not created again
        with store.changing(self.folder) as folder:
            self._take(*store.open_index(folder))
            yield folder

    def _commit(self, **changes: tuple) -> None:
        store.commit(self.folder, dataclasses.replace(self._manifest, **changes))
        self._take(*store.open_index(self.folder))

    def _take(self, manifest: Manifest, segments: list[SegmentFiles]) -> None:
        with self._lock:  # a searcher that a thread is loading is of the state before, and must not replace None
            self._manifest, self._segments, self._opened = manifest, segments, None

    @property
    def _searcher(self) -> Searcher:
        """The searcher, created by the first search: a process that only writes needs no device."""
        with self._lock:  # threads that search load the vectors once
            if self._opened is None:
                mesh = make_mesh() if self._mesh is None else self._mesh
                levels, width = self._manifest.levels, self._manifest.width
                self._opened = Searcher(self._segments, levels, width, mesh, self._resident, self._loaded)
                self._loaded = self._opened.loaded  # segments never change, so those that stay are not read again
            return self._opened

    def _validated(self, query_QRD, budget) -> tuple[np.ndarray, Stages]:
        """Check queries and a budget, and return the queries as float32 and the stages."""
        query_QRD = as_queries(query_QRD, self._manifest.width)
        if not len(self):
            raise UserError(f"{self.folder} is an empty index; add items first")
        return query_QRD, stages_of(budget, Budget(query_QRD.shape[1], self.vectors, self.width))


def _create(path: str | os.PathLike | None, mesh: Mesh | None, write: Callable[[Path], Manifest]) -> Index:
    """Create an index of the segments that `write` writes to the folder; without a path, to a temporary one."""
    if path is not None:
        with store.changing(local_path(path)) as folder:
            store.commit(folder, write(folder))
        return Index(folder, mesh)
    folder = Path(tempfile.mkdtemp(prefix="metaembed-index-"))
    try:
        store.commit(folder, write(folder))
        index = Index(folder, mesh)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(index, shutil.rmtree, folder, ignore_errors=True)
    return index
