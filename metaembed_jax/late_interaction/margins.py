"""Margins: the score of each document minus the score of the query's positive, for all groups from one pass, and their gradient.

Group g = (r_q, r_c) scores s_g(q, d) = sum over i < r_q of max over j < r_c of <q_i, d_j>. The groups are nested, so they share
one set of similarities. Document vectors are cut into blocks of columns at the r_c's: the running maximum over the blocks is each
group's maximum, and its sum over i < r_q is the group's score. Similarities are computed for a chunk of queries at a time, forward
and backward. The forward pass keeps only which document vector has each maximum.

B queries (of this device), b queries of a chunk, N positives (of all devices), K hard negatives a query, M = N + K documents that a
query ranks, R query vectors, J document vectors of a block, D width, G groups. Query vectors are the first axis, so that a prefix
of them is contiguous. Documents are the last axis, so that the maximum over j runs along whole rows of documents.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaembed_jax.late_interaction.chunks import CHUNK_BYTES, equal_chunks, split_chunks
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.prefixes import cut
from metaembed_jax.precision import float32_einsum

# For wide vectors, reading all documents for each chunk of `CHUNK_BYTES` would cost more, so a chunk has as many query vectors as
# the width, up to this size.
WIDE_CHUNK_BYTES = 32 << 20


def budget_margins(
    query_BRD: Float[Array, "B Rq D"],
    document_NRD: Float[Array, "N Rc D"],
    negatives_BKRD: Float[Array, "B K Rc D"],
    positive_B: Int[Array, " B"],
    budgets: tuple[Budget, ...],
    chunk: int | None,
) -> Float[Array, "G B M"]:
    """Return the score of every document minus the score of the query's positive, for each budget.

    Budgets of one width share a pass.

    Args:
      positive_B: the document that is the positive of each query.
      budgets: of one width, nested; vectors beyond the last are not used.
      chunk: queries at a time; None chooses by memory.
    """
    margins = {}
    # One pass over all widths, whose similarities are sums over blocks of the width, takes 0.8 times the FLOPs for a width and a
    # quarter of it, and half of them at best. But it reads all similarities once for each width anyway, and needs the maxima for
    # the gradients of lengths. Forward and backward took 120 ms of a CPU instead of 39 for widths 64 and 16, and 71 instead of 67
    # for 1,024 and 256.
    for width in dict.fromkeys(budget.width for budget in budgets):
        same_width = [budget for budget in budgets if budget.width == width]
        largest = same_width[-1]
        vectors = cut(query_BRD[:, : largest.query], width), cut(document_NRD[:, : largest.document], width)
        negatives = cut(negatives_BKRD[:, :, : largest.document], width)
        groups = tuple((budget.query, budget.document) for budget in same_width)
        margins_GBM: Any = score_margins(*vectors, negatives, positive_B, groups, chunk)  # custom_vjp loses the type
        if same_width == list(budgets):
            return margins_GBM
        margins |= zip(same_width, margins_GBM, strict=True)
    return jnp.stack([margins[budget] for budget in budgets])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def score_margins(query_BRD, document_NRD, negatives_BKRD, positive_B, groups, chunk):
    """Return the margins of groups (r_q, r_c) of one width, float32 [G, B, N + K].

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
        split_chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        split_chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        split_chunks(positive_B, size),
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
        split_chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        split_chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        split_chunks(gradient_GBM, size, axis=1),
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


score_margins.defvjp(_forward, _backward)


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
        chunk = equal_chunks(queries, max(chunk, 1))
    return min(chunk, queries)


def _unchunk(x, length, axis):
    """Reshape [chunks, ..., size, ...] to [..., length, ...] without the padding; inverse of `split_chunks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
