"""A collection of Qdrant's engine in this process, `qdrant-edge-py`, in a folder.

    FOLDER/NAME/metaembed.json   the facts that `QdrantIndex.create` recorded
    FOLDER/NAME/shard            Qdrant's files
    FOLDER/.NAME.lock            locked by the process that has the collection open

The engine has no collections, so this module writes the facts to a file. A collection is created in a temporary folder, which is
then renamed, so it is complete or does not exist. With the engine's write-ahead log, a kill loses nothing that `write` wrote.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from jaxtyping import Float

from metaembed_jax.errors import UserError
from metaembed_jax.files import locked, new_folder, read_json, write_errors, write_json
from metaembed_jax.retrieval.qdrant_collection import PAGE_POINTS, are_facts, named_vectors
from metaembed_jax.retrieval.qdrant_filters import as_edge_filter

if TYPE_CHECKING:
    from qdrant_client.models import QueryRequest
    from qdrant_edge import EdgeConfig, EdgeShard

PREFIX = "edge:"
FILE, SHARD = "metaembed.json", "shard"
NAME = re.compile(r"\w[\w .-]{0,99}")
LOG_BYTES = 64 << 20  # of vectors that are written before a flush, which shortens the log
LINKS, EF_CONSTRUCT, SCAN_KILOBYTES = 16, 100, 10_000  # of the graph: the defaults of a server


def is_edge(location) -> TypeGuard[str]:
    """Return whether a location is a folder of this engine, "edge:FOLDER"."""
    return isinstance(location, str) and location.startswith(PREFIX)


class EdgeCollection:
    """A collection in a folder; implements `qdrant_collection.Collection`.

    Args:
      location: "edge:FOLDER".
      name: name of the collection.
      facts: creates the collection with these facts if it does not exist; None only opens it.
      options: of a cluster; each must be None.

    Raises:
      UserError: the engine is not installed, the collection is open elsewhere, or there is none that `QdrantIndex` created.
    """

    def __init__(self, location: str, name: str, facts: dict | None, **options):
        try:
            import qdrant_client  # noqa: F401  its requests are translated
            import qdrant_edge  # noqa: F401
        except ImportError:
            raise UserError("Qdrant's engine is not installed: pip install 'metaembed-jax[qdrant-edge]'") from None
        self.server, self.name = f"Qdrant at {location}", name
        if unsupported := [f"{key}={value!r}" for key, value in options.items() if value is not None]:
            raise UserError(f"{unsupported[0]} is an option of a cluster, which {location} is not; leave it out")
        if not isinstance(name, str) or not NAME.fullmatch(name) or location == PREFIX:
            raise UserError(
                f"{location}, collection {name!r}: expected edge:FOLDER, and a name of letters, digits, '_', '-' and '.'"
            )
        parent = Path(location.removeprefix(PREFIX)).expanduser().absolute()
        folder = parent / name
        with edge_errors(self.server):
            if facts is None and not folder.is_dir():
                raise UserError(f"{self.server} has no collection {name!r}; create it with QdrantIndex.create")
            with write_errors(parent):
                parent.mkdir(parents=True, exist_ok=True)
            self._lock = contextlib.ExitStack()
            busy = f"{self.server}: collection {name!r} is open already, here or in another process; close it there first"
            self._lock.enter_context(locked(parent / f".{name}.lock", busy))
            try:
                if not folder.is_dir():
                    _create(folder, facts or {})
                self.facts = _read_facts(folder / FILE)
                self.client, self._unflushed, self._is_open = _open(folder / SHARD, self.facts), 0, True
            except BaseException:
                self._lock.close()
                raise

    def count(self) -> int:
        """Return the number of points."""
        from qdrant_edge import CountRequest

        with edge_errors(self.server):
            return self.client.count(CountRequest(exact=True))

    def read(self, points: Sequence[str], fields: bool | list[str]) -> dict[str, dict]:
        """Return the payloads of the points that exist."""
        payloads = {}
        with edge_errors(self.server):
            for start in range(0, len(points), PAGE_POINTS):
                records = self.client.retrieve(list(points[start : start + PAGE_POINTS]), with_payload=fields, with_vector=False)
                payloads |= {str(record.id): record.payload or {} for record in records}
        return payloads

    def scan(self, fields: list[str]) -> Iterator[dict[str, dict]]:
        """Yield the payloads of all points, `PAGE_POINTS` at once."""
        from qdrant_edge import ScrollRequest

        start, is_first = None, True
        while is_first or start is not None:
            with edge_errors(self.server):
                records, start = self.client.scroll(ScrollRequest(offset=start, limit=PAGE_POINTS, with_payload=fields))
            is_first = False
            yield {str(record.id): record.payload or {} for record in records}

    def write(self, points: Sequence[str], vectors: "Sequence[Float[np.ndarray, '_ D']]", payloads: Sequence[bytes]) -> None:
        """Write points; they replace those of the same ids."""
        from qdrant_edge import Point, UpdateOperation

        with edge_errors(self.server):
            named = [named_vectors(vectors_RD, self.facts) for vectors_RD in vectors]
            new = [Point(*fields) for fields in zip(points, named, map(json.loads, payloads), strict=True)]
            self.client.update(UpdateOperation.upsert_points(new))
            self._unflushed += sum(vectors_RD.nbytes for vectors_RD in vectors)
            if self._unflushed > LOG_BYTES:
                self.client.flush()
                self._unflushed = 0

    def delete(self, points: Sequence[str]) -> None:
        """Delete points."""
        from qdrant_edge import UpdateOperation

        with edge_errors(self.server):
            for start in range(0, len(points), PAGE_POINTS):
                self.client.update(UpdateOperation.delete_points(list(points[start : start + PAGE_POINTS])))

    def query(self, requests: "Sequence[QueryRequest]") -> list[list[tuple[float, dict]]]:
        """Return the scores and payloads of the best points of each request."""
        from qdrant_edge import QueryBatchRequest
        from qdrant_edge import QueryRequest as EdgeRequest

        with edge_errors(self.server):
            batch = [EdgeRequest(**_stage(request), with_payload=["id"]) for request in requests]
            answers = self.client.query_batch(QueryBatchRequest(batch))
        return [[(point.score, point.payload or {}) for point in answer] for answer in answers]

    def optimize(self) -> None:
        """Build the graph of the first vectors, and drop what was deleted. The engine does neither by itself."""
        with edge_errors(self.server):
            self.client.optimize()
            self.client.flush()

    def close(self) -> None:
        """Write everything to the disk, and unlock the collection; once."""
        if self._is_open:
            self._is_open = False
            with self._lock, edge_errors(self.server):
                self.client.flush()
                self.client.close()


def _create(folder: Path, facts: dict) -> None:
    """Create an empty collection, whole or not at all."""
    from qdrant_edge import EdgeShard

    with new_folder(folder) as scratch:
        (scratch / SHARD).mkdir()
        EdgeShard.create(str(scratch / SHARD), _config(facts)).close()
        write_json(scratch / FILE, facts)


def _open(shard: Path, facts: dict) -> "EdgeShard":
    """Open Qdrant's files; the engine checks that they have the vectors of the facts."""
    from qdrant_edge import EdgeShard

    return EdgeShard.load(str(shard), _config(facts))


def _config(facts: dict) -> "EdgeConfig":
    """Return the vectors of a point for this engine, equal to `qdrant_collection.vectors_config`."""
    from qdrant_edge import (
        Distance,
        EdgeConfig,
        EdgeVectorParams,
        HnswIndexConfig,
        Memory,
        MultiVectorComparator,
        MultiVectorConfig,
    )

    size, links = facts["dimension"], HnswIndexConfig(LINKS, EF_CONSTRUCT, SCAN_KILOBYTES)
    vectors = {"first": EdgeVectorParams(size, Distance.Dot, hnsw_config=links)}
    if facts["document_vectors"] > 1:
        vectors["all"] = EdgeVectorParams(
            size,
            Distance.Dot,
            multivector_config=MultiVectorConfig(MultiVectorComparator.MaxSim),
            hnsw_config=HnswIndexConfig(0, EF_CONSTRUCT, SCAN_KILOBYTES),
            memory=Memory.Cold,
        )
    return EdgeConfig(vectors)


def _read_facts(path: Path) -> dict:
    facts = read_json(path)
    if not are_facts(facts):
        raise UserError(f"{path} does not record the vectors of a collection; remove its folder, and create the collection again")
    return facts


def _stage(request) -> dict:
    """Convert a request or prefetch of Qdrant's client to the arguments of one of this engine."""
    from qdrant_edge import Prefetch, Query, SearchParams

    stage = {"limit": request.limit, "query": Query.Nearest(request.query, using=request.using)}
    if request.prefetch is not None:
        stage["prefetches"] = [Prefetch(**_stage(request.prefetch))]
    if request.filter is not None:
        stage["filter"] = as_edge_filter(request.filter)
    if request.params is not None:
        stage["params"] = SearchParams(exact=bool(request.params.exact))
    return stage


@contextlib.contextmanager
def edge_errors(server: str) -> Iterator[None]:
    """Turn any error of the engine into one line that names the folder."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # the engine raises bare exceptions, and a panic of Rust is not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{server}: {' '.join(str(error).split())[:300]}") from None
