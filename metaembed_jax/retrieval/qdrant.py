"""Nested vectors in Qdrant: embedded in this process, on a server, or on a cluster.

A point is an item. Its vector `first` is the first document vector. Its multivector `all` has all stored vectors; Qdrant's MAX_SIM
of dot products is MaxSim. Its payload is the item's metadata. Its UUID is computed from the item's id, so an item that is written
twice is stored once.

Q queries, N items, R vectors of an item, D width of a vector, k results.
"""

import functools
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.stages import Stages, as_stages
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.hits import Hits
from metaembed_jax.retrieval.ingest import as_array, check_unit
from metaembed_jax.retrieval.qdrant_collection import clear_errors, connect, is_folder, stored_facts, vectors_config
from metaembed_jax.retrieval.queries import RESULTS

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import QueryRequest

REQUEST_BYTES = 28 << 20  # a server takes 32 MiB by default
LARGEST_MULTIVECTOR = 1 << 20  # numbers
NUMBER_BYTES = 24  # of a float32 in JSON, at most
REQUEST_ITEMS, REQUEST_IDS = 64, 1000  # of a request, at most


class QdrantIndex:
    """Items in a collection of Qdrant, from `create` or `load`.

    Attributes:
      client: Qdrant's own client, for everything that this class does not do.
      dimension: width of a vector.
      document_vectors: vectors that are stored of an item. The first is also stored alone.
      fingerprint: fingerprint of the model that encoded the items.
    """

    def __init__(self, client: "QdrantClient", server: str, name: str, dimension: int, document_vectors: int, fingerprint: str):
        self.client, self.server, self.name = client, server, name
        self.dimension, self.document_vectors, self.fingerprint = dimension, document_vectors, fingerprint

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
          location: a folder or ":memory:" (embedded), the URL of a server or cluster, or a client of Qdrant (for API keys, gRPC).
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
        client, server = connect(location)
        facts = {"dimension": dimension, "document_vectors": document_vectors, "fingerprint": fingerprint}
        with clear_errors(server):
            if not client.collection_exists(name):
                client.create_collection(
                    name,
                    vectors_config=vectors_config(dimension, document_vectors),
                    metadata={"metaembed": facts},
                    shard_number=shard_number,
                    replication_factor=replication_factor,
                )
        index = cls(client, server, name, **stored_facts(client, server, name))
        for key, value in facts.items():
            if (stored := getattr(index, key)) != value:
                raise UserError(f"{server}: collection {name!r} has {key}={stored!r}, not {value!r}; choose another name")
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
        if is_folder(location) and not Path(location).is_dir():
            raise UserError(f"{location}: no such folder; create the collection with QdrantIndex.create")
        client, server = connect(location)
        index = cls(client, server, name, **stored_facts(client, server, name))
        if fingerprint not in (None, index.fingerprint):
            raise UserError(
                f"{server}: collection {name!r} has vectors of the model {index.fingerprint!r}, not {fingerprint!r}; "
                "search with that model, or create another collection"
            )
        return index

    @property
    def vectors(self) -> int:
        """Number of vectors that are stored of an item."""
        return self.document_vectors

    def __len__(self) -> int:
        with clear_errors(self.server):
            return self.client.count(self.name, exact=True).count

    def close(self) -> None:
        """Unlock the folder of an embedded collection, or close the connection."""
        self.client.close()

    def missing(self, ids: Sequence[str]) -> list[int]:
        """Return the indices of the ids that the collection does not have, in order: the rest of a killed upload.

        Raises:
          UserError: an id is not a text, or is given twice.
        """
        points, stored = _points(ids), set()
        with clear_errors(self.server):
            for start in range(0, len(points), REQUEST_IDS):
                request = points[start : start + REQUEST_IDS]
                stored |= {str(record.id) for record in self.client.retrieve(self.name, request, with_payload=False)}
        return [number for number, point in enumerate(points) if point not in stored]

    def metadata(self, ids: Sequence[str]) -> list[dict]:
        """Return the metadata of each item, with its id.

        Raises:
          UserError: the collection does not have an id, or an id is given twice.
        """
        points, payloads = _points(ids), {}
        with clear_errors(self.server):
            for start in range(0, len(points), REQUEST_IDS):
                request = points[start : start + REQUEST_IDS]
                payloads |= {str(record.id): record.payload for record in self.client.retrieve(self.name, request)}
        for item, point in zip(ids, points, strict=True):
            if point not in payloads:
                raise UserError(f"{self.server}: collection {self.name!r} has no item {item!r}")
        return [payloads[point] for point in points]

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
        points, vectors_NRD = _points(ids), self._validated(vectors_NRD, "items")
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
        payloads = [_payload(item, fields) for item, fields in zip(ids, metadata, strict=True)]
        sizes = [len(payload) + NUMBER_BYTES * self.dimension * (self.document_vectors + 1) for payload in payloads]
        if (largest := max(sizes, default=0)) > REQUEST_BYTES:
            raise UserError(
                f"item {ids[sizes.index(largest)]!r} has {largest:,} bytes; expected at most {REQUEST_BYTES:,}, Qdrant's limit; "
                "shorten its metadata"
            )
        with tqdm(total=len(ids), desc=f"uploading to {self.name}", unit="item", disable=not progress) as bar:
            for rows in _requests(sizes):
                with clear_errors(self.server):
                    self.client.upsert(self.name, [self._point(points[n], vectors_NRD[n], payloads[n]) for n in rows])
                bar.update(len(rows))

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
        exact: bool = False,
    ) -> Hits:
        """Return the k best items of each query: their MaxSim scores and ids, and on demand their metadata, without the id.

        Qdrant runs all stages in one query. If it returns fewer than k items for every query, there are fewer columns; if only for
        some, their rest is -inf and None. Ties have no fixed order.

        Args:
          query_QRD: unit vectors.
          k: number of items, at most the survivors of every stage. By default 10, or as many as those allow.
          budget: (r_q, r_c), or stages [(1, 1, 1000), (16, 64)], where each r_c is 1 or `document_vectors`. None is all vectors.
          exact: scan every first vector instead of using its graph (an embedded collection always scans).

        Raises:
          UserError: the budget needs vectors that are not stored, k is below 1 or above the survivors of a stage, or Qdrant does
            not answer.
        """
        query_QRD = self._validated(query_QRD, "queries")
        largest = query_QRD.shape[1], self.document_vectors
        stages = as_stages(largest if budget is None else budget, *largest)
        if not_stored := [stage[1] for stage in stages if stage[1] not in (1, self.document_vectors)]:
            raise UserError(
                f"budget with {not_stored[0]} document vectors: expected 1 or {self.document_vectors}, which collection "
                f"{self.name!r} stores; or create another with document_vectors={not_stored[0]}"
            )
        survivors = [stage[2] for stage in stages[:-1]]
        k = min([RESULTS, *survivors]) if k is None else k
        if not isinstance(k, int | np.integer) or not 1 <= k <= min(survivors, default=k):
            raise UserError(f"k={k!r}: expected a positive integer, at most the survivors of a stage")
        k = int(k)
        scores_Qk = np.full((len(query_QRD), k), -np.inf, np.float32)
        ids_Qk = np.full((len(query_QRD), k), None, object)
        for rows in _requests([NUMBER_BYTES * len(stages) * query_QRD.shape[1] * self.dimension] * len(query_QRD)):
            with clear_errors(self.server):
                requests = [_search_request(query_QRD[row], stages, k, exact) for row in rows]
                answers = self.client.query_batch_points(self.name, requests)
            for row, answer in zip(rows, answers, strict=True):
                for rank, point in enumerate(answer.points):
                    # The request asks for the payload's id, and `add` writes one.
                    item = point.payload["id"]  # pyright: ignore[reportOptionalSubscript]
                    scores_Qk[row, rank], ids_Qk[row, rank] = point.score, item
        is_filled_k = np.isfinite(scores_Qk).any(axis=0) | (len(scores_Qk) == 0)
        return Hits(scores_Qk[:, is_filled_k], ids_Qk[:, is_filled_k], functools.partial(self._metadata_of, ids_Qk))

    def _metadata_of(self, ids_Qk: np.ndarray, query: int) -> list[dict]:
        """Return the metadata of the hits of a query, without their ids."""
        hits = self.metadata([item for item in ids_Qk[query] if item is not None])
        return [{key: value for key, value in fields.items() if key != "id"} for fields in hits]

    def _point(self, point: str, vectors_RD: Float[np.ndarray, "R D"], payload: bytes):
        from qdrant_client.models import PointStruct

        vectors = {"first": vectors_RD[0].tolist()}
        if self.document_vectors > 1:
            vectors["all"] = vectors_RD[: self.document_vectors].tolist()
        return PointStruct(id=point, vector=vectors, payload=json.loads(payload))

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


def _search_request(query_RD: Float[np.ndarray, "R D"], stages: Stages, k: int, exact: bool) -> "QueryRequest":
    """Return one query for all stages: each stage ranks the results of its prefetch, which is the stage before it."""
    from qdrant_client.models import Prefetch, QueryRequest, SearchParams

    request: dict[str, Any] = {"params": SearchParams(exact=True)} if exact else {}
    for number, (query_vectors, document_vectors, limit) in enumerate([*stages[:-1], (*stages[-1], k)]):
        if number:
            request = {"prefetch": Prefetch(**request)}
        query_rD = query_RD[:query_vectors]
        if document_vectors == 1:  # MaxSim is then the product with the sum of the query vectors
            request |= {"using": "first", "query": query_rD.sum(0).tolist(), "limit": limit}
        else:
            request |= {"using": "all", "query": query_rD.tolist(), "limit": limit}
    return QueryRequest(**request, with_payload=["id"])


def _points(ids: Sequence[str]) -> list[str]:
    """Return the UUIDs of the points of items, which depend on the ids alone.

    Raises:
      UserError: an id is not a text, or is given twice.
    """
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise UserError(f"ids={ids!r}: expected a list of ids")
    numbers: dict[str, int] = {}
    for number, item in enumerate(ids):
        if not isinstance(item, str) or not item:
            raise UserError(f"id {item!r} at number {number}: expected a text that is not empty")
        if item in numbers:
            raise UserError(
                f"id {item!r} is given twice, at numbers {numbers[item]} and {number}; expected a unique id for each item"
            )
        numbers[item] = number
    try:
        return [str(uuid.uuid5(uuid.NAMESPACE_URL, item)) for item in ids]
    except UnicodeEncodeError as error:
        raise UserError(f"id {error.object!r}: expected text that can be encoded in UTF-8") from None


def _payload(item: str, metadata: dict) -> bytes:
    """Return the metadata of an item, with its id, as JSON."""
    if not isinstance(metadata, dict) or metadata.get("id", item) != item:
        raise UserError(f"item {item!r}: its metadata is {str(metadata)[:100]}; expected a dict without another id")
    try:
        return json.dumps({**metadata, "id": item}, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"item {item!r}: its metadata cannot be written as JSON ({error})") from None


def _requests(sizes: Sequence[int]) -> Iterator[range]:
    """Yield the rows of each request: at most REQUEST_ITEMS, and at most REQUEST_BYTES unless a single row is larger."""
    start, total = 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == REQUEST_ITEMS or total + size > REQUEST_BYTES):
            yield range(start, row)
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
