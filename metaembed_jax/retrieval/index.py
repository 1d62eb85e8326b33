"""An index: candidates on disk, searched exactly at any budget.

index = me.Index.build(c, ids=["a", "b"])       # then index.save("INDEX"), me.Index.load("INDEX")
scores, ids = index.search(q, k=10, budget=[(1, 1, 1000), (16, 64)])
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.items import as_array, as_blocks, as_ids, check_unit, longest, make_items
from metaembed_jax.retrieval.manifest import DTYPES, Manifest, Segment, levels_of
from metaembed_jax.retrieval.search import Searched, survivors
from metaembed_jax.retrieval.segment import SegmentFiles
from metaembed_jax.retrieval.writer import SegmentWriter, copied, merged, written
from metaembed_jax.sharding import make_mesh


class Index:
    """Candidates by id. `Index.build` and `Index.load` make one.

    An index lives in its folder: what is added or deleted is there when the call returns, all of it or, after a crash, nothing.
    One that was built without a folder lives in a temporary one. An index sees what it has changed itself, not what other
    processes change later; those who read go on with what they have loaded.
    """

    def __init__(self, folder: Path, mesh: Mesh | None = None):
        self.folder, self._mesh = folder.absolute(), mesh  # wherever the process goes
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
        path: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
    ) -> "Index":
        """An index of these vectors.

        Args:
          vectors: unit vectors [N, R, D], a list of [R_n, D] (any number of vectors an item), or an iterator of blocks of either:
            (ids, vectors) or (ids, vectors, metadata). One block of an iterator is held at a time.
          ids: texts, one an item, each once; the numbers from 0 by default.
          metadata: a dict an item, of what JSON can say.
          budget: keep only so many vectors of each item, the first ones. An iterator whose later blocks have items of more vectors
            than the first block needs it.
          dtype: of the vectors on disk: "bfloat16"; "float32"; or "int8", with a float32 scale for each vector (`items.to_int8`).
          path: a folder to build it in; an index that is there is replaced when the new one is complete.
          mesh: devices that will search it; all by default.

        Raises:
          UserError: there is nothing to index, or an item with something wrong, which is named.
        """
        check_dtype(dtype)
        if budget is not None and (type(budget) is not int or budget < 1):
            raise UserError(f"budget={budget!r}: expected how many vectors of an item to keep, from 1")
        blocks = (make_items(array, names, about, budget) for names, array, about in as_blocks(vectors, ids, metadata))
        first = next((block for block in blocks if block.ids), None)
        if first is None:
            raise UserError("there is nothing to index: no item was given")
        _, most, width = first.vectors_NRD.shape
        empty = Manifest(width, levels_of(budget or max(most, longest(vectors))), dtype)
        return _made(path, mesh, lambda folder: dataclasses.replace(empty, segments=(written(folder, empty, first, blocks),)))

    @classmethod
    def load(cls, path: str | os.PathLike, *, mesh: Mesh | None = None) -> "Index":
        """The index in a folder. Nothing but its outline is read: vectors are, when they are first searched.

        What is read is checked; `verify` checks everything.

        Raises:
          UserError: there is none, or it is damaged.
        """
        return cls(local_path(path), mesh)

    def save(self, path: str | os.PathLike) -> None:
        """Copies the index to a folder; an index that is there is replaced when the copy is complete.

        Raises:
          UserError: the folder holds something else, another process writes there, or this index is damaged.
        """
        folder = local_path(path)
        if folder.resolve() == self.folder.resolve():
            return
        with store.changing(folder):
            segments = tuple(copied(folder, segment) for segment in self._segments)
            store.commit(folder, dataclasses.replace(self._manifest, segments=segments))

    def search(
        self, query_QRD: Float[np.ndarray, "Q R D"], k: int = 10, budget: Budget | Sequence | None = None
    ) -> tuple[Float[np.ndarray, "Q k"], np.ndarray]:
        """MaxSim scores, float32, and ids (an array of texts) of the k best items of each query, best first; of ties, the earlier.

        Args:
          query_QRD: unit vectors, of `MetaEmbed.encode_query`.
          k: at most the number of items.
          budget: (r_q, r_c), the vectors to use of a query and of an item; or stages [(r_q, r_c, survivors), ..., (r_q, r_c)], each
            of which scores again what survived the one before. Everything that is given and stored by default.

        Raises:
          UserError: the queries or the budget do not fit what is stored, or there is no k best.
        """
        query_QRD, stages = self._checked(query_QRD, budget)
        self._check_k(k, stages)
        scores, positions = self._searched.find(query_QRD, int(k), stages)
        unique, places = np.unique(positions, return_inverse=True)
        names = np.array([*map(self._id, unique.tolist()), None], object)[:-1]  # NumPy would make an array of another type
        return scores, names[places.reshape(positions.shape)]

    def survivors(
        self,
        query_QRD: Float[np.ndarray, "Q R D"],
        first: Budget,
        last: Budget,
        *,
        k: int = 10,
        recall: float = 0.99,
    ) -> int:
        """How many items must survive a first stage, so that a second finds so much of what it would find among all.

        Args:
          query_QRD: a sample of the queries that are to come; each of them is searched for among all.
          first: the budget of the first stage of `search(q, k, [(*first, survivors), last])`.
          last: the budget of its second stage.
          k: how many items are looked for.
          recall: the share of the k best at `last` that is to survive, in the mean over the queries; 1 for all.

        Raises:
          UserError: as `search`, or there are no queries, or no such share.
        """
        (query_QRD, wanted), (_, stage) = (self._checked(query_QRD, budget) for budget in (last, first))
        if not isinstance(recall, Real) or not 0 < recall <= 1 or not len(query_QRD):
            raise UserError(f"recall={recall!r} of {len(query_QRD)} queries: expected a share above 0, and a query at least")
        if len(stage) > 1 or len(wanted) > 1:
            raise UserError(f"first={first!r}, last={last!r}: expected a budget (r_q, r_c) each; how many survive is what is asked")
        self._check_k(k, wanted)
        return survivors(self._searched, query_QRD, stage, wanted, int(k), float(recall))

    def check_model(self, model: MetaEmbed) -> None:
        """Whether a model is the one whose vectors are here.

        Raises:
          UserError: it is another one, or it is not known which one it was.
        """
        recorded = self._manifest.model
        if recorded is None:
            raise UserError(f"{self.folder} was built from vectors, and does not record of which model they are")
        if recorded["fingerprint"] != model.fingerprint:
            whose = f"{self.model or 'one'} of fingerprint {recorded['fingerprint']}, and this one has {model.fingerprint}"
            raise UserError(f"{self.folder} holds vectors of another model: {whose}; search with that one, or index again")

    def metadata(self, name: str) -> dict:
        """What is known of an item.

        Raises:
          UserError: there is no item of this id.
        """
        for segment in self._segments:
            for row in segment.find(as_ids([name])).values():
                return segment.metadata(row)
        raise UserError(f"there is no item {name!r} in {self.folder}")

    def add(self, vectors, ids: Iterable[str] | None = None, *, metadata: Sequence[dict | None] | None = None) -> None:
        """Appends items, given as for `build`. Of items that have more vectors than the index stores, the first ones are kept.

        Raises:
          UserError: an id is there already, or twice; or as `build`.
        """
        with self._changing() as folder:
            new = SegmentWriter(folder, self._manifest)
            for names, array, about in as_blocks(vectors, ids, metadata):
                items = make_items(array, names, about, self.vectors)
                for segment in self._segments:
                    for name in segment.find(items.ids):
                        raise UserError(f"the id {name!r} is there already; delete it first, or choose another")
                if items.ids:
                    new.add(items)
            if new.items:
                self._commit(segments=(*self._manifest.segments, new.close()))

    def delete(self, ids: Iterable[str]) -> None:
        """Deletes items. Their vectors stay on the disk until `compact`.

        Raises:
          UserError: there is no item of an id; then none is deleted.
        """
        ids = as_ids([ids] if isinstance(ids, str) else ids)
        with self._changing():
            found = [segment.find(ids) for segment in self._segments]
            if unknown := set(ids).difference(*found):
                raise UserError(f"there is no item {min(unknown)!r} in {self.folder}; nothing was deleted")
            segments = (
                dataclasses.replace(segment.about, deleted=tuple(sorted({*segment.about.deleted, *rows.values()})))
                for segment, rows in zip(self._segments, found, strict=True)
            )
            self._commit(segments=tuple(segments))

    def compact(self) -> None:
        """Writes all items that are left into one segment, which is smaller and faster to search.

        Raises:
          UserError: a file is damaged.
        """
        with self._changing() as folder:
            self._commit(segments=merged(folder, self._manifest, self._segments))

    def verify(self) -> None:
        """Reads everything.

        Raises:
          UserError: names the file that is damaged.
        """
        for segment in self._segments:
            segment.check_all()

    def __len__(self) -> int:
        return sum(len(segment) - len(segment.about.deleted) for segment in self._segments)

    @property
    def model(self) -> str:
        """The path or hub id of the model whose vectors are here; empty if it is not known."""
        return (self._manifest.model or {}).get("name", "")

    @property
    def vectors(self) -> int:
        """How many vectors of an item are stored, at most."""
        return self._manifest.levels[-1]

    def __repr__(self) -> str:
        about = self._manifest
        return f"<Index of {len(self):,} items, {self.vectors} x {about.width} {about.dtype}, in {self.folder}>"

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Path]:
        """Holds the folder, and has the newest that is in it."""
        with store.changing(self.folder) as folder:
            self._take(*store.open_index(folder))
            yield folder

    def _commit(self, segments: tuple[Segment, ...]) -> None:
        store.commit(self.folder, dataclasses.replace(self._manifest, segments=segments))
        self._take(*store.open_index(self.folder))

    def _take(self, manifest: Manifest, segments: list[SegmentFiles]) -> None:
        self._manifest, self._segments = manifest, segments
        self.__dict__.pop("_searched", None)

    @functools.cached_property
    def _searched(self) -> Searched:
        """Made by the first search: who only writes needs no device."""
        mesh = make_mesh() if self._mesh is None else self._mesh
        return Searched(self._segments, self._manifest.levels, self._manifest.width, mesh)

    def _id(self, position: int) -> str:
        segment, row = self._searched.place(position)
        return segment.ids([row])[0]

    def _check_k(self, k: int, stages: Stages) -> None:
        fewest = min([len(self), *(stage[2] for stage in stages[:-1])])
        if not isinstance(k, int | np.integer) or not 1 <= k <= fewest:
            most = "the number of items" if fewest == len(self) else "the survivors of a stage"
            raise UserError(f"k={k!r} must be between 1 and {fewest}, {most}")

    def _checked(self, query_QRD, budget) -> tuple[np.ndarray, Stages]:
        """The queries as float32, and the stages."""
        query_QRD = as_array(query_QRD, "queries")
        if query_QRD.ndim != 3 or query_QRD.shape[2] != self._manifest.width or not query_QRD.shape[1]:
            raise UserError(
                f"queries have the shape {query_QRD.shape}: this index takes [queries, vectors, {self._manifest.width}]"
            )
        query_QRD = query_QRD.astype(np.float32)
        queries, vectors, _ = query_QRD.shape
        check_unit(query_QRD, np.full(queries, vectors), [f"query {number}" for number in range(queries)])
        if not len(self):
            raise UserError(f"the index in {self.folder} is empty; add items first")
        try:
            return query_QRD, as_stages((vectors, self.vectors) if budget is None else budget, vectors, self.vectors)
        except UserError as error:
            raise UserError(f"{error} (this index stores {self.vectors} vectors an item)") from None


def _made(path: str | os.PathLike | None, mesh: Mesh | None, make: Callable[[Path], Manifest]) -> Index:
    """An index in a folder, of what `make` writes there; in a temporary folder if there is no path."""
    if path is not None:
        with store.changing(local_path(path)) as folder:
            store.commit(folder, make(folder))
        return Index(folder, mesh)
    folder = Path(tempfile.mkdtemp(prefix="metaembed-index-"))
    try:
        store.commit(folder, make(folder))
        index = Index(folder, mesh)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(index, shutil.rmtree, folder, ignore_errors=True)
    return index


def check_dtype(dtype: str) -> None:
    """Raises UserError where an index has no such type."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}")
