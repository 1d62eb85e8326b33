"""The Matryoshka multi-vector contrastive loss (MetaEmbed, arXiv 2509.18095), all groups from one pass.

Cross-entropy needs only the margins of the documents, so the terms of the loss are functions of them (`margins`).

B pairs, K hard negatives a pair, M = B + K documents that a query ranks, G groups. Inside `shard_map`, queries and hard negatives
are those of this device, and the positives are those of all devices, N.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_groups
from metaembed_jax.late_interaction.margins import score_margins
from metaembed_jax.late_interaction.right_documents import ItemDigests, check_digests, ranked_documents
from metaembed_jax.sharding import BATCH_AXES, batch_shards


def matryoshka_loss(
    query_BRD: Float[Array, "B Rq D"],
    document_BRD: Float[Array, "B Rc D"],
    negatives: Float[Array, "B K Rc D"] | None = None,
    groups: Sequence[Budget] = GROUPS,
    temperature: float = 0.03,
    normalization: str = "code",
    mesh: Mesh | None = None,
    chunk: int | None = None,
    negative_mask: Bool[Array, "B K"] | None = None,
    sources: Int[Array, "B"] | None = None,
    digests: ItemDigests | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Return the cross-entropy from queries to documents, for each group, averaged over the queries.

    A query ranks the positives of the whole global batch, its own at its own row, and its own hard negatives. The positives of all
    queries that are the same as it are right documents of it: it ranks no other row or hard negative that holds one of them.

    Args:
      query_BRD: unit vectors, float32 or bfloat16; similarities and logits are float32.
      document_BRD: unit vectors of the positives.
      negatives: unit vectors of the hard negatives; None if there are none.
      groups: nested budgets (r_q, r_c), smallest first; vectors beyond the last are not used.
      normalization: "code" divides the sum over groups by their number, "paper" does not.
      mesh: the batch is sharded over the axes `BATCH_AXES` and replicated over the others; None is one device.
      chunk: queries at a time; None chooses by memory. It does not change values.
      negative_mask: False marks hard negatives that are padding; None if there is no padding.
      sources: a number for each pair. A query does not rank positives of other sources; None if it ranks all.
      digests: says which items are the same; None if no two are.

    Returns:
      The loss, and for each group "loss/r_q:r_c" and "accuracy/r_q:r_c", float32 scalars. Accuracy is the share of queries whose
      positive scores strictly above every other document: a tie is a miss. If vectors tie for a maximum, the gradient goes to the
      first. With `digests`, also "same/documents" and "same/negatives", the numbers of other rows and of hard negatives of the
      batch that are not ranked because they hold a right document.

    Raises:
      UserError: the shapes do not match, an option has an unknown value, or the batch is not a multiple of the mesh's shards.
    """
    query_BRD, document_BRD = jnp.asarray(query_BRD), jnp.asarray(document_BRD)
    if negatives is None:
        negatives = jnp.zeros((document_BRD.shape[0], 0, *document_BRD.shape[1:]), document_BRD.dtype)
    negatives = jnp.asarray(negatives)
    negative_mask = jnp.ones(negatives.shape[:2], bool) if negative_mask is None else jnp.asarray(negative_mask)
    sources = jnp.zeros(query_BRD.shape[:1], jnp.int32) if sources is None else jnp.asarray(sources)
    _check_shapes(query_BRD, document_BRD, negatives, negative_mask, sources)
    if digests is not None:
        digests = ItemDigests(*map(jnp.asarray, digests))
        check_digests(digests, negative_mask.shape)
    _check_options(normalization, temperature, chunk)
    _check_mesh(len(query_BRD), mesh)
    groups = validate_groups(groups, query_BRD.shape[1], document_BRD.shape[1])
    r_q, r_c = groups[-1]
    vectors = query_BRD[:, :r_q], document_BRD[:, :r_c], negatives[:, :, :r_c]
    facts = negative_mask, sources, digests
    losses_G, accuracies_G, same_2 = _group_losses(
        *vectors, *facts, jnp.float32(temperature), groups=groups, mesh=mesh, chunk=chunk
    )
    metrics = {} if digests is None else {"same/documents": same_2[0], "same/negatives": same_2[1]}
    for name, values_G in (("loss", losses_G), ("accuracy", accuracies_G)):
        metrics |= {f"{name}/{r_q}:{r_c}": value for (r_q, r_c), value in zip(groups, values_G, strict=True)}
    return losses_G.mean() if normalization == "code" else losses_G.sum(), metrics


def _check_shapes(query, document, negatives, negative_mask, sources):
    shapes = f"query {query.shape}, document {document.shape}, negatives {negatives.shape}"
    if query.ndim != 3 or document.ndim != 3 or negatives.ndim != 4:
        raise UserError(f"matryoshka_loss: {shapes}: expected [B, R_q, D], [B, R_c, D] and [B, K, R_c, D]")
    if query.shape[0] == 0 or query.shape[0] != document.shape[0] or query.shape[2] != document.shape[2]:
        raise UserError(f"matryoshka_loss: {shapes}: expected at least one pair of a query and a document, of one width")
    if (negatives.shape[0], *negatives.shape[2:]) != document.shape:
        raise UserError(f"matryoshka_loss: {shapes}: expected negatives [B, K, R_c, D] with the documents' B, R_c and D")
    if negative_mask.shape != negatives.shape[:2] or sources.shape != query.shape[:1]:
        shapes = f"negative_mask {negative_mask.shape} and sources {sources.shape}"
        raise UserError(f"matryoshka_loss: {shapes}: expected {negatives.shape[:2]} and {query.shape[:1]}")


def _check_mesh(pairs, mesh):
    if mesh is not None and pairs % batch_shards(mesh):
        raise UserError(
            f"batch of {pairs} pairs does not divide over {batch_shards(mesh)} shards of the mesh axes "
            f"{', '.join(BATCH_AXES)}; expected a multiple of that"
        )


def _check_options(normalization, temperature, chunk):
    if normalization not in ("code", "paper"):
        raise UserError(f"normalization={normalization!r}: expected 'code' (mean over groups) or 'paper' (sum)")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise UserError(f"temperature={temperature}: expected a positive number")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk}: expected a positive number of queries")


@partial(jax.jit, static_argnames=("groups", "mesh", "chunk"))
def _group_losses(query_BRD, document_BRD, negatives_BKRD, mask_BK, source_N, digests, temperature, *, groups, mesh, chunk):
    """Return losses [G] and accuracies [G] over the global batch, and the numbers of rows and negatives that are not ranked [2]."""
    pairs = query_BRD.shape[0]
    if mesh is None:
        ranked_BM, same_2 = ranked_documents(mask_BK, source_N, digests, 0)
        losses_G, hits_G = _sums(query_BRD, document_BRD, negatives_BKRD, ranked_BM, temperature, 0, groups, chunk)
    else:
        split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()

        @partial(jax.shard_map, mesh=mesh, in_specs=(split, split, split, split, whole, whole, whole), out_specs=whole)
        def sums_of_shards(query_BRD, document_BRD, negatives_BKRD, mask_BK, source_N, digests, temperature):
            first = jax.lax.axis_index(BATCH_AXES) * query_BRD.shape[0]
            with jax.named_scope("gather"):
                document_NRD = jax.lax.all_gather(document_BRD, BATCH_AXES, tiled=True)
            ranked_BM, same_2 = ranked_documents(mask_BK, source_N, digests, first)
            sums = _sums(query_BRD, document_NRD, negatives_BKRD, ranked_BM, temperature, first, groups, chunk)
            return jax.lax.psum((*sums, same_2), BATCH_AXES)

        losses_G, hits_G, same_2 = sums_of_shards(query_BRD, document_BRD, negatives_BKRD, mask_BK, source_N, digests, temperature)
    return losses_G / pairs, hits_G / pairs, same_2


def _sums(query_BRD, document_NRD, negatives_BKRD, ranked_BM, temperature, first, groups, chunk):
    """Return the sums of losses [G] and hits [G] over this device's queries. Their positives are documents first, first + 1, ..."""
    queries = query_BRD.shape[0]
    positive_B = first + jnp.arange(queries)
    margins_GBM = score_margins(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk)
    margins_GBM = jnp.where(ranked_BM, margins_GBM, -jnp.inf)  # pyright: ignore[reportArgumentType]  custom_vjp loses the type
    # The margin of the positive is 0, so the log of the sum is minus its log-probability.
    losses_G = jax.nn.logsumexp(margins_GBM / temperature, axis=2).sum(1)
    is_positive_BM = jnp.arange(margins_GBM.shape[2]) == positive_B[:, None]
    hits_GB = jnp.all(is_positive_BM | (margins_GBM < 0), axis=2)
    return losses_G, hits_GB.astype(jnp.float32).sum(1)
