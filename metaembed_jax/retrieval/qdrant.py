"""The nested vectors in Qdrant: embedded in this process, on a server, or on a cluster.

A point is an item. It has the first candidate vector as the vector `first`, all that are stored as the multivector `all` (Qdrant's
MAX_SIM of dot products is MaxSim), and what is known of the item as its payload. Its number is made of the item's id, so what is
written twice is there once.

Q queries, N items, R vectors of an item, D their width, k items found.
"""

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
from metaembed_jax.retrieval.items import as_array, check_unit
from metaembed_jax.retrieval.qdrant_collection import clear_errors, connect, is_folder, stored_facts, vectors_config

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import QueryRequest

# A server takes requests of up to 32 MiB by default, and multivectors of up to so many numbers.
REQUEST_BYTES = 28 << 20
LARGEST_MULTIVECTOR = 1 << 20
NUMBER_BYTES = 24  # of a float32 as JSON, at most
REQUEST_ITEMS, REQUEST_IDS = 64, 1000


class QdrantIndex:
    """Items in a collection of Qdrant, from `create` or `load`. Of an embedded one, `close` unlocks its folder.

    Attributes:
      client: Qdrant's own, for all that is not here.
      dimension, candidate_vectors: D, and R of what is stored of an item; next to all of them, the first alone.
      fingerprint: of the model that made the vectors.
    """

    def __init__(self, client: "QdrantClient", place: str, name: str, dimension: int, candidate_vectors: int, fingerprint: str):
        self.client, self.place, self.name = client, place, name
        self.dimension, self.candidate_vectors, self.fingerprint = dimension, candidate_vectors, fingerprint

    @classmethod
    def create(
        cls,
        location: "str | Path | QdrantClient",
        name: str,
        dimension: int,
        candidate_vectors: int,
        fingerprint: str = "",
        *,
        shard_number: int | None = None,
        replication_factor: int | None = None,
    ) -> "QdrantIndex":
        """The collection of this name, which is made unless it is there.

        Args:
          location: a folder or ":memory:" (embedded), the URL of a server or cluster, or a client of Qdrant (for API keys, gRPC).
          name: of the collection.
          dimension: of the vectors.
          candidate_vectors: how many to store of an item, from the first.
          fingerprint: of the model, if vectors of others are to be refused.
          shard_number, replication_factor: of a cluster; None leaves them to it.

        Raises:
          UserError: Qdrant is not installed or does not answer, or the collection is there and of other vectors.
        """
        for size in (dimension, candidate_vectors):
            if not isinstance(size, int | np.integer):
                raise UserError(f"{size!r}: dimension and candidate_vectors are whole numbers")
        dimension, candidate_vectors = int(dimension), int(candidate_vectors)  # which go to Qdrant as JSON
        if dimension < 1 or candidate_vectors < 1 or dimension * candidate_vectors > LARGEST_MULTIVECTOR:
            raise UserError(
                f"{candidate_vectors} vectors of {dimension} numbers an item: Qdrant stores 1 to {LARGEST_MULTIVECTOR:,} numbers; "
                "lower candidate_vectors"
            )
        client, place = connect(location)
        facts = {"dimension": dimension, "candidate_vectors": candidate_vectors, "fingerprint": fingerprint}
        with clear_errors(place):
            if not client.collection_exists(name):
                client.create_collection(
                    name,
                    vectors_config=vectors_config(dimension, candidate_vectors),
                    metadata={"metaembed": facts},
                    shard_number=shard_number,
                    replication_factor=replication_factor,
                )
        index = cls(client, place, name, **stored_facts(client, place, name))
        for key, value in facts.items():
            if (stored := getattr(index, key)) != value:
                raise UserError(f"{place}: collection {name!r} is of {key}={stored!r}, not {value!r}; choose another name")
        return index

    @classmethod
    def load(cls, location: "str | Path | QdrantClient", name: str, fingerprint: str | None = None) -> "QdrantIndex":
        """A collection that `create` has made.

        Args:
          location: as of `create`.
          fingerprint: of the model that is to search; None takes the collection as it is.

        Raises:
          UserError: as `create`, or there is no such collection.
        """
        if is_folder(location) and not Path(location).is_dir():
            raise UserError(f"{location}: no such folder")
        client, place = connect(location)
        index = cls(client, place, name, **stored_facts(client, place, name))
        if fingerprint not in (None, index.fingerprint):
            raise UserError(f"{place}: collection {name!r} is of the model {index.fingerprint!r}, not {fingerprint!r}")
        return index

    def __len__(self) -> int:
        with clear_errors(self.place):
            return self.client.count(self.name, exact=True).count

    def close(self) -> None:
        """Unlocks the folder of an embedded collection, or ends the connection."""
        self.client.close()

    def missing(self, ids: Sequence[str]) -> list[int]:
        """Numbers of the ids that are not there, in order: what a killed upload has left to do.

        Raises:
          UserError: an id that is none or is given twice.
        """
        points, there = _points(ids), set()
        with clear_errors(self.place):
            for start in range(0, len(points), REQUEST_IDS):
                asked = points[start : start + REQUEST_IDS]
                there |= {str(record.id) for record in self.client.retrieve(self.name, asked, with_payload=False)}
        return [number for number, point in enumerate(points) if point not in there]

    def about(self, ids: Sequence[str]) -> list[dict]:
        """What `add` was told of each item, and its id.

        Raises:
          UserError: an id that is not there, or is given twice.
        """
        points, found = _points(ids), {}
        with clear_errors(self.place):
            for start in range(0, len(points), REQUEST_IDS):
                asked = points[start : start + REQUEST_IDS]
                found |= {str(record.id): record.payload for record in self.client.retrieve(self.name, asked)}
        for item, point in zip(ids, points, strict=True):
            if point not in found:
                raise UserError(f"{self.place}: collection {self.name!r} has no item {item!r}")
        return [found[point] for point in points]

    def add(
        self,
        ids: Sequence[str],
        vectors_NRD: Float[np.ndarray, "N R D"],
        metadata: Sequence[dict] | None = None,
        progress: bool = False,
    ) -> None:
        """Writes items, over those of the same ids. All are checked before the first is written.

        Args:
          ids: no two alike.
          vectors_NRD: unit vectors; the first `candidate_vectors` of each are stored, as float32.
          metadata: of each item what is JSON: its path, page, text. For `about`, and Qdrant's filters.
          progress: show a bar.

        Raises:
          UserError: names the item that is wrong, or Qdrant does not answer.
        """
        points, vectors_NRD = _points(ids), self._checked(vectors_NRD, "items")
        if vectors_NRD.shape[1] < self.candidate_vectors:
            raise UserError(
                f"items have {vectors_NRD.shape[1]} vectors, and collection {self.name!r} stores {self.candidate_vectors}"
            )
        metadata = [{}] * len(ids) if metadata is None else list(metadata)
        if not len(ids) == len(vectors_NRD) == len(metadata):
            raise UserError(
                f"{len(ids)} ids, vectors of {len(vectors_NRD)} items, metadata of {len(metadata)}: expected as many of each"
            )
        payloads = [_payload(item, known) for item, known in zip(ids, metadata, strict=True)]
        sizes = [len(payload) + NUMBER_BYTES * self.dimension * (self.candidate_vectors + 1) for payload in payloads]
        if (largest := max(sizes, default=0)) > REQUEST_BYTES:
            raise UserError(
                f"item {ids[sizes.index(largest)]!r}: with {largest:,} bytes it is more than Qdrant takes, {REQUEST_BYTES:,}; "
                "shorten its metadata"
            )
        with tqdm(total=len(ids), desc=f"uploading to {self.name}", unit="item", disable=not progress) as bar:
            for rows in _requests(sizes):
                with clear_errors(self.place):
                    self.client.upsert(self.name, [self._point(points[n], vectors_NRD[n], payloads[n]) for n in rows])
                bar.update(len(rows))

    def search(
        self, query_QRD: Float[np.ndarray, "Q R D"], k: int = 10, budget: Sequence | None = None, exact: bool = False
    ) -> tuple[Float[np.ndarray, "Q k"], np.ndarray]:
        """MaxSim scores, float32, and ids (an array of objects) of the k best items of each query, best first.

        One query of Qdrant does all stages. Where fewer than k are found, -inf and None follow. Ties are in no order.

        Args:
          query_QRD: unit vectors.
          budget: (r_q, r_c), or stages [(1, 1, 1000), (16, 64)], where each r_c is 1 or all that is stored. None is all vectors.
          exact: scan every first vector, in place of its graph (an embedded collection always does).

        Raises:
          UserError: a budget that is not stored, a k that makes no sense, or Qdrant does not answer.
        """
        query_QRD = self._checked(query_QRD, "queries")
        stored = query_QRD.shape[1], self.candidate_vectors
        stages = as_stages(stored if budget is None else budget, *stored)
        if other := [stage[1] for stage in stages if stage[1] not in (1, self.candidate_vectors)]:
            raise UserError(
                f"budget with {other[0]} candidate vectors: collection {self.name!r} has all {self.candidate_vectors} of an item, "
                f"and the first alone; choose one of these, or create another with candidate_vectors={other[0]}"
            )
        most = min((stage[2] for stage in stages[:-1]), default=k)
        if not isinstance(k, int | np.integer) or not 1 <= k <= most:
            raise UserError(f"k={k!r}: expected a whole number from 1, and of no more than survive the stages before the last one")
        k = int(k)
        scores_Qk = np.full((len(query_QRD), k), -np.inf, np.float32)
        ids_Qk = np.full((len(query_QRD), k), None, object)
        for rows in _requests([NUMBER_BYTES * len(stages) * query_QRD.shape[1] * self.dimension] * len(query_QRD)):
            with clear_errors(self.place):
                asked = [_search_request(query_QRD[row], stages, k, exact) for row in rows]
                answers = self.client.query_batch_points(self.name, asked)
            for row, answer in zip(rows, answers, strict=True):
                for rank, point in enumerate(answer.points):
                    scores_Qk[row, rank], ids_Qk[row, rank] = point.score, point.payload["id"]
        return scores_Qk, ids_Qk

    def _point(self, point: str, vectors_RD: Float[np.ndarray, "R D"], payload: bytes):
        from qdrant_client.models import PointStruct

        vectors = {"first": vectors_RD[0].tolist()}
        if self.candidate_vectors > 1:
            vectors["all"] = vectors_RD[: self.candidate_vectors].tolist()
        return PointStruct(id=point, vector=vectors, payload=json.loads(payload))

    def _checked(self, vectors_NRD, what: str) -> Float[np.ndarray, "N R D"]:
        vectors_NRD = as_array(vectors_NRD, what)
        if vectors_NRD.ndim != 3 or vectors_NRD.shape[1] < 1 or vectors_NRD.shape[2] != self.dimension:
            raise UserError(
                f"{what}: vectors {vectors_NRD.shape}: collection {self.name!r} takes [items, vectors, {self.dimension}]"
            )
        vectors_NRD = vectors_NRD.astype(np.float32)
        items, vectors, _ = vectors_NRD.shape
        check_unit(vectors_NRD, np.full(items, vectors), [f"number {row} of the {what}" for row in range(items)])
        return vectors_NRD


def _search_request(query_RD: Float[np.ndarray, "R D"], stages: Stages, k: int, exact: bool) -> "QueryRequest":
    """All stages as one query: each one is asked of what the one before, its prefetch, has found."""
    from qdrant_client.models import Prefetch, QueryRequest, SearchParams

    asked: dict[str, Any] = {"params": SearchParams(exact=True)} if exact else {}
    for number, (query_vectors, candidate_vectors, limit) in enumerate([*stages[:-1], (*stages[-1], k)]):
        if number:
            asked = {"prefetch": Prefetch(**asked)}
        chosen_RD = query_RD[:query_vectors]
        if candidate_vectors == 1:  # one vector wins every maximum, so the sum of products is the product of the sum
            asked |= {"using": "first", "query": chosen_RD.sum(0).tolist(), "limit": limit}
        else:
            asked |= {"using": "all", "query": chosen_RD.tolist(), "limit": limit}
    return QueryRequest(**asked, with_payload=["id"])


def _points(ids: Sequence[str]) -> list[str]:
    """The numbers of points (UUIDs) of items, always the same.

    Raises:
      UserError: an id that is no text, or is there twice.
    """
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise UserError(f"ids={ids!r}: expected a list of ids")
    numbers: dict[str, int] = {}
    for number, item in enumerate(ids):
        if not isinstance(item, str) or not item:
            raise UserError(f"id {item!r} at number {number}: expected text")
        if item in numbers:
            raise UserError(f"id {item!r} is there twice, at numbers {numbers[item]} and {number}")
        numbers[item] = number
    try:
        return [str(uuid.uuid5(uuid.NAMESPACE_URL, item)) for item in ids]
    except UnicodeEncodeError as error:
        raise UserError(f"id {error.object!r}: has a character that is none") from None


def _payload(item: str, known: dict) -> bytes:
    """What is known of an item, with its id, as JSON."""
    if not isinstance(known, dict) or known.get("id", item) != item:
        raise UserError(f"item {item!r}: its metadata is {str(known)[:100]}; expected a dict, and no other id")
    try:
        return json.dumps({**known, "id": item}, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"item {item!r}: its metadata is no JSON ({error})") from None


def _requests(sizes: Sequence[int]) -> Iterator[range]:
    """Rows of one request after the other: at most REQUEST_ITEMS, and REQUEST_BYTES unless one alone is more."""
    start, total = 0, 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == REQUEST_ITEMS or total + size > REQUEST_BYTES):
            yield range(start, row)
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
