"""Connections to Qdrant, the vectors and facts of a collection, and Qdrant's errors as one line each."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from metaembed_jax.errors import UserError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

SECONDS = 60  # timeout of a request: a scan of all items is slow
FACTS = {"dimension", "document_vectors", "fingerprint"}


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


def is_folder(location) -> TypeGuard[str | Path]:
    """Return whether a location is a folder, not a server or memory."""
    return isinstance(location, Path) or (isinstance(location, str) and location != ":memory:" and "://" not in location)


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
    if not isinstance(facts, dict) or facts.keys() != FACTS:
        raise UserError(
            f"{server}: collection {name!r} does not record its vectors; expected one that QdrantIndex created, "
            "on Qdrant 1.16 or newer"
        )
    return facts


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
