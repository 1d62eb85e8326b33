"""Nested vectors in Qdrant: in this process, on a server, or on a cluster.

A point is an item. Its vector `first` is the first document vector. Its multivector `all` has all stored vectors; Qdrant's MAX_SIM
of dot products is MaxSim. Its payload is the item's metadata. Its UUID is computed from the item's id, so an item that is written
twice is stored once.

Q queries, N items, R vectors of an item, D width of a vector, k results.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.hits import Hits
from metaembed_jax.retrieval.index import Index
from metaembed_jax.retrieval.ingest import as_array, check_unit
from metaembed_jax.retrieval.qdrant_collection import ClientCollection, Collection
from metaembed_jax.retrieval.qdrant_edge import EdgeCollection, is_edge
from metaembed_jax.retrieval.qdrant_filters import as_qdrant_filter
from metaembed_jax.retrieval.qdrant_following import Followed, follow
from metaembed_jax.retrieval.qdrant_points import NUMBER_BYTES, REQUEST_BYTES, as_metadata, as_payload, as_points, as_requests
from metaembed_jax.retrieval.queries import RESULTS

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
    from qdrant_client.models import QueryRequest

LARGEST_MULTIVECTOR = 1 << 20  # numbers


class QdrantIndex:
    """Items in a collection of Qdrant, from `create` or `load`.

    Attributes:
      client: Qdrant's own client, for everything that this class does not do; of "edge:FOLDER", its `EdgeShard`.
      dimension: width of a vector.
      document_vectors: vectors that are stored of an item. The first is also stored alone.
      fingerprint: fingerprint of the model that encoded the items.
    """

    def __init__(self, collection: Collection):
        self.collection, self.client, self.server, self.name = collection, collection.client, collection.server, collection.name
        self.dimension: int = collection.facts["dimension"]
        self.document_vectors: int = collection.facts["document_vectors"]
        self.fingerprint: str = collection.facts["fingerprint"]

    @classmethod
    def create(
        cls,
        location: "str | Path | QdrantClient",
        name: str,
        dimension: int,
        document_vectors: int,
        fingerprint: str = "",
        *,
        shard_number: int | None = None,
        replication_factor: int | None = None,
    ) -> "QdrantIndex":
        """Open the collection of this name; create it if it does not exist.

        Args:
          location: "edge:FOLDER" (Qdrant's engine in this process), a folder or ":memory:" (the engine of its Python client), the
            URL of a server or cluster, or a client of Qdrant (for API keys, gRPC).
          name: name of the collection.
          dimension: width of a vector.
          document_vectors: vectors to store of an item, from the first.
          fingerprint: fingerprint of the model; `create` and `load` refuse a collection with another one.
          shard_number, replication_factor: options of a cluster; None takes its defaults.

        Raises:
          UserError: Qdrant is not installed or does not answer, or the collection exists and has other vectors.
        """
        for size in (dimension, document_vectors):
            if not isinstance(size, int | np.integer):
                raise UserError(f"dimension={dimension!r}, document_vectors={document_vectors!r}: expected positive integers")
        dimension, document_vectors = int(dimension), int(document_vectors)  # JSON has no NumPy integers
        if dimension < 1 or document_vectors < 1 or dimension * document_vectors > LARGEST_MULTIVECTOR:
            raise UserError(
                f"document_vectors={document_vectors} of dimension={dimension}: expected 1 to {LARGEST_MULTIVECTOR:,} numbers, "
                "which Qdrant stores of an item; lower document_vectors"
            )
        if not isinstance(fingerprint, str):
            raise UserError(f"fingerprint={fingerprint!r}: expected a text, such as model.fingerprint")
        facts = {"dimension": dimension, "document_vectors": document_vectors, "fingerprint": fingerprint}
        options = {"shard_number": shard_number, "replication_factor": replication_factor}
        index = cls(_open(location, name, facts, **options))
        for key, value in facts.items():
            if (stored := index.collection.facts[key]) != value:
                index._release(location)
                raise UserError(f"{index.server}: collection {name!r} has {key}={stored!r}, not {value!r}; choose another name")
        return index

    @classmethod
    def load(cls, location: "str | Path | QdrantClient", name: str, fingerprint: str | None = None) -> "QdrantIndex":
        """Open a collection that `create` created.

        Args:
          location: as for `create`.
          fingerprint: fingerprint of the model that encodes the queries; None does not check it.

        Raises:
          UserError: as `create`, or the collection does not exist.
        """
        index = cls(_open(location, name, None))
        if fingerprint not in (None, index.fingerprint):
            index._release(location)
            raise UserError(
                f"{index.server}: collection {name!r} has vectors of the model {index.fingerprint!r}, not {fingerprint!r}; "
                "search with that model, or create another collection"
            )
        return index

    @property
    def vectors(self) -> int:
        """Number of vectors that are stored of an item."""
        return self.document_vectors

    def __len__(self) -> int:
        return self.collection.count()

    def close(self) -> None:
        """Unlock the folder of a collection, or close the connection."""
        self.collection.close()

    def optimize(self) -> None:
        """Build the graph of the first vectors, and drop what was deleted. Qdrant does so by itself, except in "edge:FOLDER"."""
        self.collection.optimize()

    def missing(self, ids: Sequence[str]) -> list[int]:
        """Return the indices of the ids that the collection does not have, in order, such as the rest of a killed upload.

        Raises:
          UserError: an id is not a text, or is given twice.
        """
        points = as_points(ids)
        stored = self.collection.read(points, False)
        return [number for number, point in enumerate(points) if point not in stored]

    def metadata(self, ids: Sequence[str]) -> list[dict]:
        """Return the metadata of each item, with its id.

        Raises:
          UserError: the collection does not have an id, or an id is given twice.
        """
        points = as_points(ids)
        payloads = self.collection.read(points, True)
        self._require(ids, points, payloads)
        return [as_metadata(payloads[point]) for point in points]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete items.

        Raises:
          UserError: the collection does not have an id, or an id is given twice; then nothing is deleted.
        """
        points = as_points(ids)
        self._require(ids, points, self.collection.read(points, False))
        self.collection.delete(points)

    def add(
        self,
        ids: Sequence[str],
        vectors_NRD: Float[np.ndarray, "N R D"],
        metadata: Sequence[dict] | None = None,
        progress: bool = False,
    ) -> None:
        """Write items. They replace items with the same ids. All are checked before the first is written.

        Args:
          ids: a text for each item, all different.
          vectors_NRD: unit vectors; the first `document_vectors` of each item are stored, as float32.
          metadata: a dict of JSON values for each item, such as its path, page and text, for `metadata` and for Qdrant's filters.
          progress: show a bar.

        Raises:
          UserError: an item is wrong, which the error names, or Qdrant does not answer.
        """
        points, vectors_NRD = as_points(ids), self._validated(vectors_NRD, "items")
        if vectors_NRD.shape[1] < self.document_vectors:
            raise UserError(
                f"items have {vectors_NRD.shape[1]} vectors: expected at least {self.document_vectors}, which collection "
                f"{self.name!r} stores"
            )
        metadata = [{}] * len(ids) if metadata is None else list(metadata)
        if not len(ids) == len(vectors_NRD) == len(metadata):
            raise UserError(
                f"{len(ids)} ids, vectors of {len(vectors_NRD)} items, metadata of {len(metadata)}: expected equal numbers"
            )
        payloads = [as_payload(item, fields) for item, fields in zip(ids, metadata, strict=True)]
        sizes = [len(payload) + NUMBER_BYTES * self.dimension * (self.document_vectors + 1) for payload in payloads]
        if (largest := max(sizes, default=0)) > REQUEST_BYTES:
            raise UserError(
                f"item {ids[sizes.index(largest)]!r} has {largest:,} bytes; expected at most {REQUEST_BYTES:,}, Qdrant's limit; "
                "shorten its metadata"
            )
        vectors_NrD = vectors_NRD[:, : self.document_vectors]
        with tqdm(total=len(ids), desc=f"uploading to {self.name}", unit="item", disable=not progress) as bar:
            for rows in as_requests(sizes):
                rows = slice(rows.start, rows.stop)
                self.collection.write(points[rows], list(vectors_NrD[rows]), payloads[rows])
                bar.update(len(points[rows]))

    def follow(self, index: Index, progress: bool = False) -> Followed:
        """Give the collection the items of an index, and no others: new and changed ones are written, and what is gone is deleted.

        A run that was killed is continued by the next. An item of fewer vectors than `document_vectors` keeps all that it has.

        Args:
          index: its state when it was loaded; its width and model are those of the collection.
          progress: show a bar.

        Returns:
          The numbers of items that were written, deleted and kept.

        Raises:
          UserError: the index has vectors of another model, width or number, a file of it is damaged, or Qdrant does not answer.
        """
        return follow(self.collection, index, progress)

    def check_model(self, model: MetaEmbed) -> None:
        """Check that this model encoded the items.

        Raises:
          UserError: another model did, or the collection does not record its model.
        """
        if self.fingerprint != model.fingerprint:
            recorded = f"records the model {self.fingerprint!r}" if self.fingerprint else "does not record its model"
            raise UserError(
                f"{self.server}: collection {self.name!r} {recorded}, expected this one, {model.fingerprint!r}; "
                "search with the model that encoded the items, or create another collection with fingerprint=model.fingerprint"
            )

    def search(
        self,
        query_QRD: Float[np.ndarray, "Q R D"],
        k: int | None = None,
        budget: Sequence | None = None,
        *,
        where: Mapping | None = None,
        exact: bool = False,
    ) -> Hits:
        """Return the k best items of each query: their MaxSim scores and ids, and on demand their metadata, without the id.

        Qdrant runs all stages in one request. If it returns fewer than k items for every query, there are fewer columns; if only
        for some, their rows end with -inf and None. Ties have no fixed order.

        Args:
          query_QRD: unit vectors.
          k: number of items, at most the survivors of every stage. By default 10, or as many as those allow.
          budget: (r_q, r_c), or stages [(1, 1, 1000), (16, 64)], where each r_c is 1 or `document_vectors`, without a width.
            None is all vectors.
          where: search only items whose metadata match, as for `Index.search`; `qdrant_filters` has the differences.
          exact: scan every first vector instead of using its graph (an embedded collection always scans).

        Raises:
          UserError: the budget needs vectors that are not stored, k is below 1 or above the survivors of a stage, the filter is
            wrong or more than Qdrant can compare, or Qdrant does not answer.
        """
        query_QRD = self._validated(query_QRD, "queries")
        largest = Budget(query_QRD.shape[1], self.document_vectors, self.dimension)
        stages = as_stages(largest[:2] if budget is None else budget, largest)
        if any(stage.budget.numbers(self.dimension) < self.dimension for stage in stages):
            raise UserError(
                f"budget {search_name(stages)}: expected budgets without a width, because Qdrant multiplies all numbers of a "
                "vector; search an `Index`"
            )
        documents = (stage.budget.document for stage in stages)
        if not_stored := [vectors for vectors in documents if vectors not in (1, self.document_vectors)]:
            raise UserError(
                f"budget with {not_stored[0]} document vectors: expected 1 or {self.document_vectors}, which collection "
                f"{self.name!r} stores; or create another with document_vectors={not_stored[0]}"
            )
        condition = None if where is None else as_qdrant_filter(where)
        survivors = [stage.survivors for stage in stages[:-1]]
        k = min([RESULTS, *survivors]) if k is None else k
        if not isinstance(k, int | np.integer) or not 1 <= k <= min(survivors, default=k):
            raise UserError(f"k={k!r}: expected a positive integer, at most the survivors of a stage")
        k = int(k)
        scores_Qk = np.full((len(query_QRD), k), -np.inf, np.float32)
        ids_Qk = np.full((len(query_QRD), k), None, object)
        for rows in as_requests([NUMBER_BYTES * len(stages) * query_QRD.shape[1] * self.dimension] * len(query_QRD)):
            results = self.collection.query([_search_request(query_QRD[row], stages, k, condition, exact) for row in rows])
            for row, points in zip(rows, results, strict=True):
                for rank, (score, payload) in enumerate(points):
                    scores_Qk[row, rank], ids_Qk[row, rank] = score, payload["id"]
        is_filled_k = np.isfinite(scores_Qk).any(axis=0) | (len(scores_Qk) == 0)
        return Hits(scores_Qk[:, is_filled_k], ids_Qk[:, is_filled_k], functools.partial(self._metadata_of, ids_Qk))

    def _metadata_of(self, ids_Qk: np.ndarray, query: int) -> list[dict]:
        """Return the metadata of the hits of a query, without their ids."""
        hits = self.metadata([item for item in ids_Qk[query] if item is not None])
        return [{key: value for key, value in fields.items() if key != "id"} for fields in hits]

    def _release(self, location) -> None:
        """Close what `create` or `load` opened; a client that the caller gave stays open."""
        if isinstance(location, str | Path):
            self.close()

    def _require(self, ids: Sequence[str], points: Sequence[str], stored: dict[str, dict]) -> None:
        for item, point in zip(ids, points, strict=True):
            if point not in stored:
                raise UserError(f"{self.server}: collection {self.name!r} has no item {item!r}")

    def _validated(self, vectors_NRD, name: str) -> Float[np.ndarray, "N R D"]:
        vectors_NRD = as_array(vectors_NRD, name)
        if vectors_NRD.ndim != 3 or vectors_NRD.shape[1] < 1 or vectors_NRD.shape[2] != self.dimension:
            raise UserError(
                f"{name}: vectors {vectors_NRD.shape}: expected [items, vectors, {self.dimension}] for collection {self.name!r}"
            )
        vectors_NRD = vectors_NRD.astype(np.float32)
        items, vectors, _ = vectors_NRD.shape
        check_unit(vectors_NRD, np.full(items, vectors), [f"number {row} of the {name}" for row in range(items)])
        return vectors_NRD


def _open(location: "str | Path | QdrantClient", name: str, facts: dict | None, **options) -> Collection:
    """Open a collection; with facts, create it if it does not exist."""
    if is_edge(location):
        return EdgeCollection(location, name, facts, **options)
    return ClientCollection(location, name, facts, **options)


def _search_request(
    query_RD: Float[np.ndarray, "R D"], stages: Stages, k: int, condition: "models.Filter | None", exact: bool
) -> "QueryRequest":
    """Return one request for all stages: each stage ranks the results of its prefetch, which is the stage before it.

    The filter is applied in the first stage.
    """
    from qdrant_client.models import Prefetch, QueryRequest, SearchParams

    request: dict[str, Any] = {"filter": condition} | ({"params": SearchParams(exact=True)} if exact else {})
    for number, ((query_vectors, document_vectors, _), survivors) in enumerate(stages):
        limit = survivors or k
        if number:
            request = {"prefetch": Prefetch(**request)}
        query_rD = query_RD[:query_vectors]
        if document_vectors == 1:  # MaxSim is then the product with the sum of the query vectors
            request |= {"using": "first", "query": query_rD.sum(0).tolist(), "limit": limit}
        else:
            request |= {"using": "all", "query": query_rD.tolist(), "limit": limit}
    return QueryRequest(**request, with_payload=["id"])
