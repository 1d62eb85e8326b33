"""The engine's search of a resident index as a program to plan, with abstract tiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.flops import search_flops
from metaembed_jax.late_interaction import engine
from metaembed_jax.late_interaction.budgets import budget_name, parse_searches, search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.sizes import ceil_power
from metaembed_jax.late_interaction.stages import Stages, scored_documents
from metaembed_jax.late_interaction.tiles import TILE, Tiles, count_tiles
from metaembed_jax.network_config import model_config
from metaembed_jax.planning.programs import Program
from metaembed_jax.sharding import replicated


class Search(NamedTuple):
    """An index and a search of it.

    Attributes:
      items: documents of the index.
      vectors, width: vectors of a document, and their numbers.
      dtype: type of the stored vectors.
      queries: queries of a call; the program has the next power of two.
      stages: from `as_stages`.
      k: documents to return.
    """

    items: int
    vectors: int
    width: int
    dtype: str
    queries: int
    stages: Stages
    k: int

    def __str__(self) -> str:
        queries = "1 query" if self.queries == 1 else f"{self.queries} queries"
        return (
            f"{queries} of {search_name(self.stages)} in {self.items:,} items "
            f"of {self.vectors} x {self.width:,} {self.dtype}, the {self.k} best"
        )


def make_search(
    config: RunConfig,
    items: int = 100_000,
    vectors: int | None = None,
    width: int | None = None,
    dtype: str = "bfloat16",
    queries: int = 32,
    budget: str | None = None,
    k: int = 10,
) -> Search:
    """Return a search from flags, with defaults from the config.

    Raises:
      UserError: a number is not positive, or the budget has another form or more vectors than the items.
    """
    vectors = config.model.document_tokens if vectors is None else vectors
    width = (config.model.embedding_dim or model_config(config).architecture.width) if width is None else width
    numbers = {"--items": items, "--vectors": vectors, "--width": width, "--queries": queries, "-k": k}
    for flag, number in numbers.items():
        if number < 1:
            raise UserError(f"{flag}={number}: expected a positive integer")
    largest = Budget(config.model.query_tokens, vectors, width)
    stages, *others = parse_searches(budget or budget_name(largest[:2]), largest, "--budget")
    if others:
        raise UserError(f"--budget={budget}: expected one search")
    fewest = min(scored_documents(stages, items))
    if k > fewest:
        raise UserError(f"-k={k}: expected at most {fewest}, the documents of the last stage")
    return Search(items, vectors, width, dtype, queries, stages, k)


def search_program(config: RunConfig, mesh: Mesh, search: Search) -> Program:
    """Return a search of an index whose vectors are on the devices, every item with all its vectors."""
    stages, width = search.stages, search.width
    queries = ceil_power(search.queries)
    split, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), replicated(mesh)
    shape = count_tiles(search.items, mesh.size), search.vectors, TILE
    tiles = Tiles(
        vectors=_abstract((*shape, width), search.dtype, split),
        scales=_abstract(shape, jnp.float32, split) if search.dtype == "int8" else None,
        counts=None,
        is_candidate=_abstract((shape[0], TILE), bool, split),
        first=_abstract((), jnp.int32, whole),
        prefixes={budget.width: _abstract(shape, jnp.float32, split) for budget, _ in stages if budget.numbers(width) < width},
    )
    stage_queries = tuple(_abstract((queries, budget.query, budget.numbers(width)), jnp.float32, whole) for budget, _ in stages)
    counts = [
        search_flops(queries, budget.query, documents, budget.document, budget.numbers(width))
        for (budget, _), documents in zip(stages, scored_documents(stages, search.items), strict=True)
    ]
    vector_bytes = width * jnp.dtype(search.dtype).itemsize + (4 if search.dtype == "int8" else 0)
    return Program(
        lambda: engine.search.trace(stage_queries, (tiles,), stages, search.k, mesh),
        {"batch": stage_queries, "index": tiles},
        sum(counts[1:], counts[0]),
        search.queries,
        "queries",
        details=str(search),
        index_bytes=search.items * search.vectors * vector_bytes / mesh.size,
    )


def _abstract(shape: tuple[int, ...], dtype, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
