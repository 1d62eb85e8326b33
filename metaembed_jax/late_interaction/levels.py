"""Exact MaxSim of candidates whose vectors lie in levels, a block of them after the other, with a running best.

The levels hold a candidate's vectors [0, 1), [1, 4), ...: the maximum over all is the maximum of the levels' maxima.

Q queries, R vectors of a query, n candidates of a block, w vectors of a level, D width of a vector, k candidates that are kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from metaembed_jax.late_interaction.maxsim import product

QUERY_ROWS = 256  # vectors of queries that are scored at once


class Block(NamedTuple):
    """Candidates, in the order of their positions.

    Attributes:
      positions: int32 [n]; -1 marks one that is not there.
      counts: int32 [n], how many vectors each has; None where all have as many as the levels.
      levels: [n, w, D] each, float or int8.
      scales: float32 [n, w] each, what the vectors of int8 are multiplied by; empty for floats.
    """

    positions: Int[Array, " n"]
    counts: Int[Array, " n"] | None
    levels: tuple[Array, ...]
    scales: tuple[Array, ...]


class Best(NamedTuple):
    """The best candidates so far of each query, best first; of ties, the first position.

    Attributes:
      scores: float32 [Q, k], -inf where there are fewer.
      positions: int32 [Q, k], -1 there.
    """

    scores: Float[Array, "Q k"]
    positions: Int[Array, "Q k"]


def no_best(queries: int, k: int) -> Best:
    """Before the first block."""
    return Best(jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), -1, jnp.int32))


def score_levels(query_QRD: Float[Array, "Q R D"], block: Block) -> Float[Array, "Q n"]:
    """MaxSim of every query and candidate of a block, float32; -inf for one that is not there."""
    best_QRn, first = -jnp.inf, 0
    for number, level_nwD in enumerate(block.levels):
        # Candidates last, as in `maxsim`: the maximum over j then runs along whole rows of them.
        similarity_QRwn = product("qid,njd->qijn", query_QRD, level_nwD)
        if block.scales:
            similarity_QRwn *= block.scales[number].T
        vectors = first + jnp.arange(level_nwD.shape[1])
        if block.counts is not None:
            similarity_QRwn = jnp.where(vectors[:, None] < block.counts, similarity_QRwn, -jnp.inf)
        best_QRn = jnp.maximum(best_QRn, similarity_QRwn.max(2))
        first += level_nwD.shape[1]
    return jnp.where(block.positions < 0, -jnp.inf, best_QRn.sum(1))


@partial(jax.jit, static_argnames=("items", "mesh"))
def merge_block(query_QRD: Float[Array, "Q R D"], block: Block, best: Best, items: int, mesh: Mesh) -> Best:
    """The best of those so far and of the next block.

    The scores are the same bits however many devices there are, and however many candidates a block has.

    Args:
      query_QRD: whole on every device; Q is a power of two.
      block: its candidates over all devices of the mesh, in order; all behind those of `best`.
      items: candidates that are scored at once; divides those of each device.
    """
    axes, k = tuple(mesh.axis_names), best.scores.shape[1]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,  # what is gathered is the same everywhere, which the check does not see
    )
    def merged(query_QRD, block, best):
        scores_Qn = _score_in_parts(query_QRD, block, items)
        scores, places = jax.lax.top_k(scores_Qn, min(k, scores_Qn.shape[1]))
        found = Best(scores, block.positions[places])
        found = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in found)
        scores, positions = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
        scores, places = jax.lax.top_k(scores, k)  # of ties the first, whose position is lower
        return Best(scores, jnp.take_along_axis(positions, places, axis=1))

    return merged(query_QRD, block, best)


def _score_in_parts(query_QRD: Array, block: Block, items: int) -> Float[Array, "Q n"]:
    """`score_levels`, of so many candidates and about `QUERY_ROWS` vectors of queries at once."""
    queries, vectors, width = query_QRD.shape
    at_once = min(queries, 1 << max(QUERY_ROWS // vectors, 1).bit_length() - 1)
    query_parts = query_QRD.reshape(-1, at_once, vectors, width)
    block_parts = jax.tree.map(lambda x: x.reshape(-1, items, *x.shape[1:]), block)

    def score(part):
        return jax.lax.map(lambda query_qRD: score_levels(query_qRD, part), query_parts)  # [query parts, q, items]

    scores = jax.lax.map(score, block_parts)  # [block parts, query parts, q, items]
    return jnp.moveaxis(scores, 0, 2).reshape(queries, -1)
