"""The Matryoshka multi-vector contrastive loss (MetaEmbed, arXiv 2509.18095), all groups from one pass.

Group g = (r_q, r_c) scores s_g(q, d) = sum over i < r_q of max over j < r_c of <q_i, d_j>. The groups are nested, so they share
one set of similarities. Document vectors are cut into blocks of columns at the r_c's: the running maximum over the blocks is each
group's maximum, and its sum over i < r_q is the group's score. Similarities are computed for a chunk of queries at a time, forward
and backward. The forward pass keeps only which document vector has each maximum.

B queries (of this device), b queries of a chunk, N positives (of all devices), K hard negatives a query, M = N + K documents that a
query ranks, R query vectors, J document vectors of a block, D width, G groups. Query vectors are the first axis, so that a prefix
of them is contiguous. Documents are the last axis, so that the maximum over j runs along whole rows of documents.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_groups
from metaembed_jax.late_interaction.right_documents import ItemDigests, check_digests, ranked_documents
from metaembed_jax.precision import float32_einsum
from metaembed_jax.sharding import BATCH_AXES, batch_shards

# The similarities of a chunk fit a CPU's cache. For wide vectors, reading all documents for each chunk would cost more, so a chunk
# has as many query vectors as the width, up to the larger size.
CHUNK_BYTES = 16 << 20
WIDE_CHUNK_BYTES = 32 << 20


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
    margins_GBM = _margins(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk)
    margins_GBM = jnp.where(ranked_BM, margins_GBM, -jnp.inf)  # pyright: ignore[reportArgumentType]  custom_vjp loses the type
    # The margin of the positive is 0, so the log of the sum is minus its log-probability.
    losses_G = jax.nn.logsumexp(margins_GBM / temperature, axis=2).sum(1)
    is_positive_BM = jnp.arange(margins_GBM.shape[2]) == positive_B[:, None]
    hits_GB = jnp.all(is_positive_BM | (margins_GBM < 0), axis=2)
    return losses_G, hits_GB.astype(jnp.float32).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _margins(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk):
    """Return the score of every document minus the score of the query's positive, float32 [G, B, N + K].

    Cross-entropy needs only these differences, and they are more exact than scores: scores near 16 have a float32 step of 1e-6, and
    of 3e-5 after the temperature, while differences of similarities are exact for documents that are close.
    """
    return _forward(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk)[0]


def _forward(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk):
    size = _chunk_size(query_BRD, document_NRD, chunk)
    document_blocks, ranges = _column_blocks(jnp.swapaxes(document_NRD, 0, 1), groups), _column_ranges(groups)
    index_dtype = jnp.int8 if groups[-1][1] <= 127 else jnp.int16

    def margins_of_chunk(inputs):
        query_RbD, negatives_JbKD, positive_b = inputs
        negative_blocks = _column_blocks(negatives_JbKD, groups)

        def maximum_of_block(number: int) -> tuple[Array, Array]:
            similarities = _similarities(query_RbD, document_blocks[number], negative_blocks[number])
            columns_J = jnp.arange(*ranges[number], dtype=index_dtype)
            pairs = zip(*(_max_and_first(similarity, columns_J) for similarity in similarities), strict=True)
            maximum_RbM, winner_RbM = (jnp.concatenate(pair, axis=-1) for pair in pairs)
            return maximum_RbM, winner_RbM

        maximum_RbM, winner_RbM = maximum_of_block(0)
        margins, winners = [], []
        for number, (r_q, _) in enumerate(groups):
            start, end = ranges[number]
            if number and end > start:
                block_maximum, block_winner = maximum_of_block(number)
                # Strictly above: a tie stays with the first vector.
                winner_RbM = jnp.where(block_maximum > maximum_RbM, block_winner, winner_RbM)
                maximum_RbM = jnp.maximum(block_maximum, maximum_RbM)
            of_positive_Rb1 = jnp.take_along_axis(maximum_RbM[:r_q], positive_b[None, :, None], axis=2)
            margins.append((maximum_RbM[:r_q] - of_positive_Rb1).sum(0))
            winners.append(winner_RbM[:r_q])
        return jnp.stack(margins), winners

    inputs = (
        _chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        _chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        _chunks(positive_B, size),
    )
    margins, winners = jax.lax.map(margins_of_chunk, inputs)
    return _unchunk(margins, query_BRD.shape[0], axis=1), (query_BRD, document_NRD, negatives_BKRD, positive_B, winners)


def _backward(groups, chunk, residuals, gradient_GBM):
    query_BRD, document_NRD, negatives_BKRD, positive_B, winners = residuals
    size = _chunk_size(query_BRD, document_NRD, chunk)
    document_blocks = _column_blocks(jnp.swapaxes(document_NRD, 0, 1), groups)
    # Each margin contains minus the score of the positive.
    is_positive_BM = jnp.arange(gradient_GBM.shape[2]) == positive_B[:, None]
    gradient_GBM = gradient_GBM - jnp.where(is_positive_BM, gradient_GBM.sum(2, keepdims=True), 0)

    def gradients_of_chunk(document_gradients, inputs):
        query_RbD, negatives_JbKD, gradient_GbM, winners = inputs
        coefficients = _block_coefficients(gradient_GbM, winners)
        blocks = zip(_column_ranges(groups), coefficients, document_blocks, _column_blocks(negatives_JbKD, groups), strict=True)
        query_gradient, block_gradients, negative_gradients = jnp.zeros(query_RbD.shape, jnp.float32), [], []
        for (columns, (winner_RbM, coefficient_RbM), document_JND, negative_JbKD), sum_JND in zip(
            blocks, document_gradients, strict=True
        ):
            dq, dc, dn = _block_gradients(columns, winner_RbM, coefficient_RbM, query_RbD, document_JND, negative_JbKD)
            query_gradient += dq
            block_gradients.append(sum_JND + dc)
            negative_gradients.append(dn)
        return block_gradients, (query_gradient.astype(query_RbD.dtype), jnp.concatenate(negative_gradients))

    inputs = (
        _chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        _chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        _chunks(gradient_GBM, size, axis=1),
        winners,
    )
    start = [jnp.zeros_like(block, jnp.float32) for block in document_blocks]
    document_gradients, (query_gradient, negative_gradient) = jax.lax.scan(gradients_of_chunk, start, inputs)
    queries = query_BRD.shape[0]
    return (
        jnp.swapaxes(_unchunk(query_gradient, queries, axis=1), 0, 1),
        jnp.swapaxes(jnp.concatenate(document_gradients), 0, 1).astype(document_NRD.dtype),
        jnp.moveaxis(_unchunk(negative_gradient, queries, axis=1), 0, 2),
        None,
    )


_margins.defvjp(_forward, _backward)


def _block_coefficients(gradient_GbM, winners):
    """Return, for each block of columns, the winning column of each maximum and the gradient of its similarity.

    Groups with a winner in the same block have the same winner, because the maximum is a running one; so a block needs one pair.
    From the last group to the first, the gradient of the next group is added to a group's own where both have the same winner. Rows
    that a group does not use are those of the next group.

    Returns:
      G pairs (column [R, b, M], gradient [R, b, M]); columns outside of the block add nothing to its gradient.
    """
    winner_RbM = winners[-1]
    coefficient_RbM = jnp.broadcast_to(gradient_GbM[-1], winner_RbM.shape)
    pairs = [(winner_RbM, coefficient_RbM)]
    for group in reversed(range(len(winners) - 1)):
        rows = winners[group].shape[0]
        shared = jnp.where(winners[group] == winner_RbM[:rows], coefficient_RbM[:rows], 0)
        coefficient_RbM = jnp.concatenate([gradient_GbM[group] + shared, coefficient_RbM[rows:]])
        winner_RbM = jnp.concatenate([winners[group], winner_RbM[rows:]])
        pairs.append((winner_RbM, coefficient_RbM))
    return pairs[::-1]


def _block_gradients(columns, winner_RbM, coefficient_RbM, query_RbD, document_JND, negative_JbKD):
    """Return the gradients of queries [R, b, D], documents [J, N, D] and negatives [J, b, K, D] from a block of columns."""
    positives = document_JND.shape[1]
    column_J1 = jnp.arange(*columns, dtype=winner_RbM.dtype)[:, None]

    def similarity_gradient(documents):
        # Positives and negatives are selected separately: slicing them from one result would be another pass over it.
        is_winner = winner_RbM[:, :, None, documents] == column_J1
        return jnp.where(is_winner, coefficient_RbM[:, :, None, documents], 0).astype(query_RbD.dtype)

    positives_RbJN, negatives_RbJK = similarity_gradient(slice(positives)), similarity_gradient(slice(positives, None))
    dq = float32_einsum("rbjn,jnd->rbd", positives_RbJN, document_JND)
    dq += float32_einsum("rbjk,jbkd->rbd", negatives_RbJK, negative_JbKD)
    dc = float32_einsum("rbjn,rbd->jnd", positives_RbJN, query_RbD)
    dn = float32_einsum("rbjk,rbd->jbkd", negatives_RbJK, query_RbD)
    return dq, dc, dn.astype(negative_JbKD.dtype)


def _similarities(query_RbD, document_JND, negative_JbKD):
    """Return float32 similarities [R, b, J, N] to the positives and [R, b, J, K] to the queries' own negatives."""
    return float32_einsum("rbd,jnd->rbjn", query_RbD, document_JND), float32_einsum("rbd,jbkd->rbjk", query_RbD, negative_JbKD)


def _max_and_first(similarity_RbJM, columns_J):
    """Return the maximum over J and its first column, by two reductions: XLA's argmax is several times slower on a CPU."""
    maximum_RbM = similarity_RbJM.max(2)
    is_maximum = similarity_RbJM == maximum_RbM[:, :, None]
    return maximum_RbM, jnp.where(is_maximum, columns_J[:, None], columns_J[-1]).min(2)


def _column_ranges(groups):
    """Return the columns [start, end) that each group adds to the group before it."""
    ends = [r_c for _, r_c in groups]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _column_blocks(x_J, groups):
    return [x_J[start:end] for start, end in _column_ranges(groups)]


def _chunk_size(query_BRD, document_NRD, chunk):
    queries, vectors, width = query_BRD.shape
    if chunk is None:
        bytes_a_query = 4 * vectors * document_NRD.shape[0] * document_NRD.shape[1]
        rows_as_wide = -(-width // vectors)
        chunk = min(max(CHUNK_BYTES // bytes_a_query, rows_as_wide), WIDE_CHUNK_BYTES // bytes_a_query)
        # Chunks of nearly equal size need little padding.
        chunk = -(-queries // -(-queries // max(chunk, 1)))
    return min(chunk, queries)


def _chunks(x, size, axis=0):
    """Reshape [..., B, ...] to [chunks, ..., size, ...]; the last chunk is padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :]), axis, 0)


def _unchunk(x, length, axis):
    """Reshape [chunks, ..., size, ...] to [..., length, ...] without the padding; inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
