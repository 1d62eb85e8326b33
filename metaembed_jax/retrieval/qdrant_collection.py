"""A collection of Qdrant's client: embedded in this process, on a server, or on a cluster; and Qdrant's errors as one line each."""

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import QueryRequest

SECONDS = 60  # timeout of a request: a scan of all items is slow
FACTS = {"dimension": int, "document_vectors": int, "fingerprint": str}
HOST_PORT = re.compile(r"[\w.-]+:\d+/?")
PAGE_POINTS = 1000  # points that are read at once


class Collection(Protocol):
    """Points of a collection: their vectors, and their payloads, which are dicts.

    Attributes:
      client: Qdrant's own object for everything else.
      server: name of the server, in errors.
      name: name of the collection.
      facts: what `QdrantIndex.create` recorded: dimension, document_vectors and fingerprint.
    """

    client: Any
    server: str
    name: str
    facts: dict

    def count(self) -> int:
        """Return the number of points."""
        ...

    def read(self, points: Sequence[str], fields: bool | list[str]) -> dict[str, dict]:
        """Return the payloads of the points that exist."""
        ...

    def scan(self, fields: list[str]) -> Iterator[dict[str, dict]]:
        """Yield the payloads of all points, `PAGE_POINTS` at once."""
        ...

    def write(self, points: Sequence[str], vectors: "Sequence[Float[np.ndarray, '_ D']]", payloads: Sequence[bytes]) -> None:
        """Write points in one request; they replace those of the same ids. Payloads are JSON."""
        ...

    def delete(self, points: Sequence[str]) -> None:
        """Delete points."""
        ...

    def query(self, requests: "Sequence[QueryRequest]") -> list[list[tuple[float, dict]]]:
        """Return the scores and payloads of the best points of each request."""
        ...

    def optimize(self) -> None:
        """Merge segments and build graphs, if the engine does not do so by itself."""
        ...

    def close(self) -> None:
        """Unlock a folder, or close a connection."""
        ...


class ClientCollection:
    """A collection behind Qdrant's client; implements `Collection`.

    Args:
      location: a folder, ":memory:", the URL of a server, or a client.
      name: name of the collection.
      facts: creates the collection with these facts if it does not exist; None only opens it.
      options: of `QdrantClient.create_collection`.

    Raises:
      UserError: Qdrant is not installed or does not answer, or there is no collection that `QdrantIndex` created.
    """

    def __init__(self, location, name: str, facts: dict | None, **options):
        check_location(location)
        if facts is None and is_folder(location) and not Path(location).is_dir():
            raise UserError(f"{location}: no such folder; create the collection with QdrantIndex.create")
        self.client, self.server = connect(location)
        self.name = name
        with clear_errors(self.server):
            if facts is not None and not self.client.collection_exists(name):
                config = vectors_config(facts["dimension"], facts["document_vectors"])
                self.client.create_collection(name, vectors_config=config, metadata={"metaembed": facts}, **options)
        self.facts = stored_facts(self.client, self.server, name)

    def count(self) -> int:
        """Return the number of points."""
        with clear_errors(self.server):
            return self.client.count(self.name, exact=True).count

    def read(self, points: Sequence[str], fields: bool | list[str]) -> dict[str, dict]:
        """Return the payloads of the points that exist."""
        payloads = {}
        with clear_errors(self.server):
            for start in range(0, len(points), PAGE_POINTS):
                records = self.client.retrieve(self.name, points[start : start + PAGE_POINTS], with_payload=fields)
                payloads |= {str(record.id): record.payload or {} for record in records}
        return payloads

    def scan(self, fields: list[str]) -> Iterator[dict[str, dict]]:
        """Yield the payloads of all points, `PAGE_POINTS` at once."""
        start, is_first = None, True
        while is_first or start is not None:
            with clear_errors(self.server):
                records, start = self.client.scroll(self.name, limit=PAGE_POINTS, offset=start, with_payload=fields)
            is_first = False
            yield {str(record.id): record.payload or {} for record in records}

    def write(self, points: Sequence[str], vectors: "Sequence[Float[np.ndarray, '_ D']]", payloads: Sequence[bytes]) -> None:
        """Write points in one request; they replace those of the same ids."""
        from qdrant_client.models import PointStruct

        structs = []
        for point, vectors_RD, payload in zip(points, vectors, payloads, strict=True):
            structs.append(PointStruct(id=point, vector=named_vectors(vectors_RD, self.facts), payload=json.loads(payload)))
        with clear_errors(self.server):
            self.client.upsert(self.name, structs)

    def delete(self, points: Sequence[str]) -> None:
        """Delete points."""
        with clear_errors(self.server):
            for start in range(0, len(points), PAGE_POINTS):
                self.client.delete(self.name, list(points[start : start + PAGE_POINTS]))

    def query(self, requests: "Sequence[QueryRequest]") -> list[list[tuple[float, dict]]]:
        """Return the scores and payloads of the best points of each request."""
        with clear_errors(self.server):
            answers = self.client.query_batch_points(self.name, requests)
        return [[(point.score, point.payload or {}) for point in answer.points] for answer in answers]

    def optimize(self) -> None:
        """Do nothing: a server optimizes by itself, and the embedded engine has no graph."""

    def close(self) -> None:
        """Unlock the folder of an embedded collection, or close the connection."""
        self.client.close()


def connect(location) -> tuple["QdrantClient", str]:
    """Return a client, and the name of its server in errors."""
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise UserError("Qdrant's client is not installed: pip install 'metaembed-jax[qdrant]'") from None
    if isinstance(location, QdrantClient):
        return location, "Qdrant"
    server = f"Qdrant at {location}"
    with clear_errors(server):
        if is_folder(location):
            return QdrantClient(path=str(location)), server
        # An older server is noticed where the facts of the collection are read.
        return QdrantClient(location, timeout=SECONDS, check_compatibility=False), server


def check_location(location) -> None:
    """Check a text that names a folder or a server.

    Raises:
      UserError: it has another scheme than http, or is a host and a port without one.
    """
    if not isinstance(location, str):
        return
    scheme, separator, _ = location.partition("://")
    if not location or (separator and scheme not in ("http", "https")) or HOST_PORT.fullmatch(location):
        raise UserError(f"Qdrant at {location!r}: expected http://HOST:PORT, https://HOST:PORT, edge:FOLDER or a folder")


def is_folder(location) -> TypeGuard[str | Path]:
    """Return whether a location is a folder, not a server or memory."""
    return isinstance(location, Path) or (isinstance(location, str) and location != ":memory:" and "://" not in location)


def named_vectors(vectors_RD: Float[np.ndarray, "R D"], facts: dict) -> dict[str, Any]:
    """Return the vectors of a point by name, as lists. An item may have fewer vectors than the collection stores."""
    vectors: dict[str, Any] = {"first": vectors_RD[0].tolist()}
    if facts["document_vectors"] > 1:
        vectors["all"] = vectors_RD.tolist()
    return vectors


def vectors_config(dimension: int, document_vectors: int) -> dict:
    """Return the vectors of a point. `first` has a graph. `all` has none, because it only ranks results or is scanned."""
    from qdrant_client.models import Distance, HnswConfigDiff, MultiVectorComparator, MultiVectorConfig, VectorParams

    config = {"first": VectorParams(size=dimension, distance=Distance.DOT)}
    if document_vectors > 1:
        config["all"] = VectorParams(
            size=dimension,
            distance=Distance.DOT,
            multivector_config=MultiVectorConfig(comparator=MultiVectorComparator.MAX_SIM),
            hnsw_config=HnswConfigDiff(m=0),
            on_disk=True,
        )
    return config


def stored_facts(client: "QdrantClient", server: str, name: str) -> dict:
    """Read the facts that `QdrantIndex.create` recorded in a collection."""
    with clear_errors(server):
        if not client.collection_exists(name):
            raise UserError(f"{server} has no collection {name!r}; create it with QdrantIndex.create")
        facts = (client.get_collection(name).config.metadata or {}).get("metaembed")
    if not are_facts(facts):
        raise UserError(
            f"{server}: collection {name!r} does not record its vectors; expected one that QdrantIndex created, "
            "on Qdrant 1.16 or newer"
        )
    return facts


def are_facts(facts) -> TypeGuard[dict]:
    """Return whether an object of JSON has the facts of a collection."""
    is_described = isinstance(facts, dict) and facts.keys() == FACTS.keys()
    return is_described and all(type(facts[key]) is kind and facts[key] != 0 for key, kind in FACTS.items())


@contextmanager
def clear_errors(server: str) -> Iterator[None]:
    """Turn any error of Qdrant into one line that names the server."""
    from grpc import RpcError
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except UserError:
        raise
    except ResponseHandlingException as error:
        raise UserError(f"{server} does not answer ({error.source}); check that it runs, and its address") from None
    except UnexpectedResponse as error:
        answer = error.content[:300].decode(errors="replace")
        raise UserError(f"{server}: answered {error.status_code} {error.reason_phrase}: {answer}") from None
    # An embedded collection raises Python's own errors: a folder in use, a name with a slash, a broken file.
    except (ApiException, QdrantException, RpcError, RuntimeError, ValueError, OSError, sqlite3.Error) as error:
        raise UserError(f"{server}: {' '.join(str(error).split())[:300]}") from None
