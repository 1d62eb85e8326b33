"""Exact MaxSim of documents whose vectors are stored by level, block by block, with a running top k.

The levels hold a document's vectors [0, 1), [1, 4), ... The maximum over all vectors is the maximum over the levels' maxima.

Q queries, R vectors of a query, n documents of a block, w vectors of a level, D width of a vector, k results.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from metaembed_jax.precision import float32_einsum

QUERY_VECTORS = 256  # that are scored at once


class Block(NamedTuple):
    """Documents of an index that are scored together, in the order of their positions.

    Attributes:
      positions: int32 [n]; -1 marks padding and deleted documents.
      counts: int32 [n], vectors of each document; None if all documents have those of all levels.
      levels: an array [n, w, D] for each level, float or int8.
      scales: an array [n, w] for each level of int8, float32, with a factor for each vector; empty for floats.
    """

    positions: Int[Array, " n"]
    counts: Int[Array, " n"] | None
    levels: tuple[Array, ...]
    scales: tuple[Array, ...]


class TopK(NamedTuple):
    """The best documents of each query so far, best first; of ties, the first position.

    Attributes:
      scores: float32 [Q, k]; -inf if there are fewer documents.
      positions: int32 [Q, k]; -1 if there are fewer documents.
    """

    scores: Float[Array, "Q k"]
    positions: Int[Array, "Q k"]


def empty_top_k(queries: int, k: int) -> TopK:
    """Return a top k without documents, to start a merge from."""
    return TopK(jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), -1, jnp.int32))


def score_levels(query_QRD: Float[Array, "Q R D"], block: Block) -> Float[Array, "Q n"]:
    """Return MaxSim of every query and every document of a block, float32; -inf for padding and deleted documents."""
    maxima, first = [], 0
    for number, level_nwD in enumerate(block.levels):
        # Documents are the last axis, as in `maxsim`, so that the maximum over j runs along whole rows of documents.
        similarity_QRwn = float32_einsum("qid,njd->qijn", query_QRD, level_nwD)
        if block.scales:
            similarity_QRwn *= block.scales[number].T
        vectors = first + jnp.arange(level_nwD.shape[1])
        if block.counts is not None:
            similarity_QRwn = jnp.where(vectors[:, None] < block.counts, similarity_QRwn, -jnp.inf)
        maxima.append(similarity_QRwn.max(2))
        first += level_nwD.shape[1]
    return jnp.where(block.positions < 0, -jnp.inf, reduce(jnp.maximum, maxima).sum(1))


@partial(jax.jit, static_argnames=("at_once", "mesh"))
def merge_block(query_QRD: Float[Array, "Q R D"], block: Block, top: TopK, at_once: int, mesh: Mesh) -> TopK:
    """Score the next block, and merge its best documents into the top k so far.

    The scores are the same bits on any number of devices, and for blocks of any size.

    Args:
      query_QRD: replicated on every device; Q is a power of two.
      block: sharded over all devices of the mesh, in order; its positions follow those of `top`.
      at_once: documents that a device scores at once; divides the documents of a device.
    """
    axes, k = tuple(mesh.axis_names), top.scores.shape[1]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,  # the check does not see that gathered arrays are replicated
    )
    def merged(query_QRD, block, top):
        scores_Qn = _score_block(query_QRD, block, at_once)
        scores, rows = jax.lax.top_k(scores_Qn, min(k, scores_Qn.shape[1]))
        local = TopK(scores, block.positions[rows])
        of_block = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in local)
        scores, positions = (jnp.concatenate(pair, axis=1) for pair in zip(top, of_block, strict=True))
        scores, columns = jax.lax.top_k(scores, k)  # of ties, the first column, which has the lowest position
        return TopK(scores, jnp.take_along_axis(positions, columns, axis=1))

    return merged(query_QRD, block, top)


def _score_block(query_QRD: Array, block: Block, at_once: int) -> Float[Array, "Q n"]:
    """`score_levels` in steps of `at_once` documents and about `QUERY_VECTORS` query vectors."""
    queries, vectors, width = query_QRD.shape
    queries_at_once = min(queries, 1 << max(QUERY_VECTORS // vectors, 1).bit_length() - 1)
    query_steps = query_QRD.reshape(-1, queries_at_once, vectors, width)
    block_steps = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), block)

    def score(documents: Block):
        return jax.lax.map(lambda query_qRD: score_levels(query_qRD, documents), query_steps)  # [query steps, q, at_once]

    scores = jax.lax.map(score, block_steps)  # [block steps, query steps, q, at_once]
    return jnp.moveaxis(scores, 0, 2).reshape(queries, -1)
