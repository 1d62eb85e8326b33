"""Collections of Qdrant: where they are, how they keep vectors, what they say of themselves; and errors as one line each."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_jax.errors import UserError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

SECONDS = 60  # that an answer may take: a scan of everything is slow
FACTS = {"dimension", "candidate_vectors", "fingerprint"}


def connect(location) -> tuple["QdrantClient", str]:
    """A client, and how messages call its place."""
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise UserError("Qdrant's client is not installed: pip install 'metaembed-jax[qdrant]'") from None
    if isinstance(location, QdrantClient):
        return location, "Qdrant"
    place = f"Qdrant at {location}"
    with clear_errors(place):
        if is_folder(location):
            return QdrantClient(path=str(location)), place
        # What an older server lacks is noticed where the collection is read back.
        return QdrantClient(location, timeout=SECONDS, check_compatibility=False), place


def is_folder(location) -> bool:
    return isinstance(location, Path) or (isinstance(location, str) and location != ":memory:" and "://" not in location)


def vectors_config(dimension: int, candidate_vectors: int) -> dict:
    """`first` has a graph. `all` has none, as it ranks only what others have found, or is scanned; it stays on disk."""
    from qdrant_client.models import Distance, HnswConfigDiff, MultiVectorComparator, MultiVectorConfig, VectorParams

    config = {"first": VectorParams(size=dimension, distance=Distance.DOT)}
    if candidate_vectors > 1:
        config["all"] = VectorParams(
            size=dimension,
            distance=Distance.DOT,
            multivector_config=MultiVectorConfig(comparator=MultiVectorComparator.MAX_SIM),
            hnsw_config=HnswConfigDiff(m=0),
            on_disk=True,
        )
    return config


def stored_facts(client: "QdrantClient", place: str, name: str) -> dict:
    """What `create` has written of a collection."""
    with clear_errors(place):
        if not client.collection_exists(name):
            raise UserError(f"{place}: has no collection {name!r}")
        facts = (client.get_collection(name).config.metadata or {}).get("metaembed")
    if not isinstance(facts, dict) or facts.keys() != FACTS:
        raise UserError(
            f"{place}: collection {name!r} does not say of what it is; it was not made by QdrantIndex, "
            "or by a server older than Qdrant 1.16"
        )
    return facts


@contextmanager
def clear_errors(place: str) -> Iterator[None]:
    """Whatever Qdrant raises becomes one line that names the place."""
    from grpc import RpcError
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except UserError:
        raise
    except ResponseHandlingException as error:
        raise UserError(f"{place}: does not answer ({error.source}); is it running, and is this where?") from None
    except UnexpectedResponse as error:
        answer = error.content[:300].decode(errors="replace")
        raise UserError(f"{place}: answered {error.status_code} {error.reason_phrase}: {answer}") from None
    # An embedded one raises Python's own: a folder in use, a name with a slash, a file that is broken.
    except (ApiException, QdrantException, RpcError, RuntimeError, ValueError, OSError, sqlite3.Error) as error:
        raise UserError(f"{place}: {' '.join(str(error).split())[:300]}") from None
