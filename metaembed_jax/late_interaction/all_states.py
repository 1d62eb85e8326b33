"""The contrastive loss over all token states, as in ColBERT and ColPali: items have different numbers of vectors.

A query of r_q vectors scores a document with s(q, d) = 1 / r_q * sum over i of max over j of <q_i, d_j>. It is a mean, so that long
queries are not sharper than short ones (`normalize_scores` of colpali-engine, with its temperature). Similarities are computed for
a chunk of queries at a time, forward and backward, so they never take memory for all pairs of items.

B queries (of this device), b queries of a chunk, N positives (of all devices), K hard negatives a query, M = N + K documents that a
query ranks, R vectors of an item at most, J of a document, D width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.late_interaction.chunks import CHUNK_BYTES, equal_chunks, split_chunks
from metaembed_jax.late_interaction.right_documents import ItemDigests, ranked_documents
from metaembed_jax.precision import float32_einsum
from metaembed_jax.sharding import BATCH_AXES

TEMPERATURE = 0.02


class VectorCounts(NamedTuple):
    """Numbers of vectors of the items of pairs, each at least 1. An item's vectors are its first; the others are padding.

    Attributes:
      queries, positives, negatives: of each pair's items.
    """

    queries: Int[Array, "B"]
    positives: Int[Array, "B"]
    negatives: Int[Array, "B K"]


def all_states_loss(
    query_BRD: Float[Array, "B Rq D"],
    document_BRD: Float[Array, "B Rd D"],
    negatives: Float[Array, "B K Rd D"] | None,
    counts: VectorCounts,
    temperature: float = TEMPERATURE,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    negative_mask: Bool[Array, "B K"] | None = None,
    sources: Int[Array, "B"] | None = None,
    digests: ItemDigests | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Return the cross-entropy from queries to documents, averaged over the queries.

    Padding is ignored. A query ranks the same documents as in `matryoshka_loss`.

    Args:
      query_BRD: unit vectors, float32 or bfloat16; similarities and logits are float32.
      document_BRD: unit vectors of the positives.
      negatives: unit vectors of the hard negatives; None if there are none.
      counts: numbers of vectors; the others are padding.
      mesh, chunk, negative_mask, sources, digests: as for `matryoshka_loss`.

    Returns:
      The loss, and "loss/Rq:Rd" and "accuracy/Rq:Rd", float32 scalars: as those of a group of `matryoshka_loss`. With `digests`,
      also "same/documents" and "same/negatives".
    """
    if negatives is None:
        negatives = jnp.zeros((document_BRD.shape[0], 0, *document_BRD.shape[1:]), document_BRD.dtype)
    negative_mask = jnp.ones(negatives.shape[:2], bool) if negative_mask is None else negative_mask
    sources = jnp.zeros(query_BRD.shape[:1], jnp.int32) if sources is None else sources
    pairs, chunk = query_BRD.shape[0], chunk or _chunk_size(query_BRD, document_BRD, negatives)
    sums = partial(_sums, temperature=temperature, chunk=chunk)
    documents, facts = (document_BRD, counts.positives), (negative_mask, sources, digests)
    queries = (query_BRD, counts.queries, negatives, counts.negatives)
    if mesh is None:
        loss, hits, same_2 = sums(queries, documents, facts, 0)
    else:
        loss, hits, same_2 = _sharded(sums, mesh)(queries, documents, facts)
    name = f"{query_BRD.shape[1]}:{document_BRD.shape[1]}"
    figures = {} if digests is None else {"same/documents": same_2[0], "same/negatives": same_2[1]}
    return loss / pairs, figures | {f"loss/{name}": loss / pairs, f"accuracy/{name}": hits / pairs}


def _sharded(sums, mesh):
    """Return `sums` over the queries of all shards, each of which ranks the documents of all shards."""
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=(split, split, (split, whole, whole)), out_specs=whole)
    def sums_of_shards(queries, documents, facts):
        first = jax.lax.axis_index(BATCH_AXES) * queries[0].shape[0]
        with jax.named_scope("gather"):
            documents = jax.tree.map(lambda x: jax.lax.all_gather(x, BATCH_AXES, tiled=True), documents)
        return jax.lax.psum(sums(queries, documents, facts, first), BATCH_AXES)

    return sums_of_shards


def _sums(queries, documents, facts, first, *, temperature, chunk):
    """Return the sums of losses and hits over this device's queries, and the numbers of documents that are not ranked [2].

    Their positives are documents first, first + 1, ...
    """
    mask_BK, source_N, digests = facts
    ranked_BM, same_2 = ranked_documents(mask_BK, source_N, digests, first)
    positive_B = first + jnp.arange(ranked_BM.shape[0])

    @jax.checkpoint
    def sums_of_chunk(inputs):
        queries, ranked_bM, positive_b, is_query_b = inputs
        # A query of padding ranks all: the logarithm of an empty sum would have no gradient.
        ranked_bM |= ~is_query_b[:, None]
        margins_bM = jnp.where(ranked_bM, _margins(queries, documents, positive_b), -jnp.inf)
        # The margin of the positive is 0, so the log of the sum is minus its log-probability.
        losses_b = jax.nn.logsumexp(margins_bM / temperature, axis=1)
        is_positive_bM = jnp.arange(margins_bM.shape[1]) == positive_b[:, None]
        hits_b = jnp.all(is_positive_bM | (margins_bM < 0), axis=1)
        return jnp.where(is_query_b, losses_b, 0).sum(), (hits_b & is_query_b).sum().astype(jnp.float32)

    inputs = queries, ranked_BM, positive_B, jnp.ones(positive_B.shape, bool)
    losses, hits = jax.lax.map(sums_of_chunk, jax.tree.map(lambda x: split_chunks(x, min(chunk, positive_B.shape[0])), inputs))
    return losses.sum(), hits.sum(), same_2


def _margins(queries, documents, positive_b):
    """Return the score of every document minus the score of the query's positive, float32 [b, N + K]."""
    (query_bRD, count_b, negatives_bKJD, count_bK), (document_NJD, count_N) = queries, documents
    # Documents are the last axis, so that the maximum over j runs along whole rows of documents.
    similarities = float32_einsum("brd,njd->brjn", query_bRD, document_NJD)
    negative_similarities = float32_einsum("brd,bkjd->brjk", query_bRD, negatives_bKJD)
    vectors_J1 = jnp.arange(document_NJD.shape[1])[:, None]
    similarities = jnp.where(vectors_J1 < count_N, similarities, -jnp.inf).max(2)
    negative_similarities = jnp.where(vectors_J1 < count_bK[:, None, None], negative_similarities, -jnp.inf).max(2)
    maximum_bRM = jnp.concatenate([similarities, negative_similarities], axis=2)
    of_positive_bR1 = jnp.take_along_axis(maximum_bRM, positive_b[:, None, None], axis=2)
    is_vector_bR1 = (jnp.arange(query_bRD.shape[1]) < count_b[:, None])[:, :, None]
    return jnp.where(is_vector_bR1, maximum_bRM - of_positive_bR1, 0).sum(1) / jnp.maximum(count_b, 1)[:, None]


def _chunk_size(query_BRD, document_BRD, negatives_BKRD):
    """Return the number of queries whose similarities take at most `CHUNK_BYTES`."""
    documents = document_BRD.shape[0] + negatives_BKRD.shape[1]
    at_once = max(CHUNK_BYTES // (4 * query_BRD.shape[1] * documents * document_BRD.shape[1]), 1)
    return equal_chunks(query_BRD.shape[0], at_once)
