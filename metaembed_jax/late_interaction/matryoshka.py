"""The Matryoshka multi-vector contrastive loss (MetaEmbed, arXiv 2509.18095), all groups from one pass.

Group g = (r_q, r_c) scores s_g(q, c) = sum over i < r_q of max over j < r_c of <q_i, c_j>. The groups are nested, so they share
one set of similarities: the columns are cut into blocks at the r_c's, a running maximum over the blocks is each group's maximum,
and a prefix sum over i at r_q is its score. Only a chunk of queries has its similarities in memory at a time, forward and
backward; what is kept in between is which candidate vector won each maximum.

B queries (of this device), b queries of a chunk, N positives (of all devices), K hard negatives a query, M = N + K candidates of a
query, R query vectors, J candidate vectors of a block, D width, G groups. Query vectors come first, candidates last: the maximum
over j then runs along whole rows of candidates, and a prefix of query vectors is contiguous.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS, Budget, validate_groups
from metaembed_jax.late_interaction.maxsim import product

# A chunk's similarities: few enough for a CPU's cache, unless the vectors are so wide that reading the candidates
# anew for each chunk would cost more; then as many query vectors as the width, up to the larger size.
CHUNK_BYTES = 16 << 20
WIDE_CHUNK_BYTES = 32 << 20


def matryoshka_loss(
    query_BRD: Float[Array, "B Rq D"],
    candidate_BRD: Float[Array, "B Rc D"],
    negatives: Float[Array, "B K Rc D"] | None = None,
    groups: Sequence[Budget] = GROUPS,
    temperature: float = 0.03,
    normalization: str = "code",
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    chunk: int | None = None,
    negative_mask: Bool[Array, "B K"] | None = None,
    sources: Int[Array, "B"] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy from queries to candidates, for each group, averaged over the queries.

    A query's candidates are the positives of the whole global batch, its own at its own row, and its own hard negatives.

    Args:
      query_BRD: unit vectors, float32 or bfloat16; similarities and logits are float32.
      candidate_BRD: unit vectors of the positives.
      negatives: unit vectors of the hard negatives; None: no pair has any.
      groups: nested budgets (r_q, r_c), smallest first; vectors beyond the last are not used.
      normalization: "code" divides the sum over groups by their number, "paper" does not.
      mesh: the batch is split over its `batch_axes` and repeated over the others; None is one device.
      chunk: queries at a time; None chooses by memory. It changes no value.
      negative_mask: false for hard negatives that are none, only there to fill the array; None: all count.
      sources: of each pair, a number. Given, positives of other sources are no candidates of a query.

    Returns:
      The loss, and for each group "loss/r_q:r_c" and "accuracy/r_q:r_c" (the share of queries whose positive scores strictly
      above every other candidate: a tie is a miss), float32 scalars. Where vectors tie for a maximum, the gradient goes to the
      first.

    Raises:
      UserError: shapes, groups or normalization that make no sense, or a batch that the mesh does not divide.
    """
    query_BRD, candidate_BRD = jnp.asarray(query_BRD), jnp.asarray(candidate_BRD)
    if negatives is None:
        negatives = jnp.zeros((candidate_BRD.shape[0], 0, *candidate_BRD.shape[1:]), candidate_BRD.dtype)
    negatives = jnp.asarray(negatives)
    _check(query_BRD, candidate_BRD, negatives, normalization, temperature, chunk)
    negative_mask = jnp.ones(negatives.shape[:2], bool) if negative_mask is None else jnp.asarray(negative_mask)
    sources = jnp.zeros(len(query_BRD), jnp.int32) if sources is None else jnp.asarray(sources)
    if negative_mask.shape != negatives.shape[:2] or sources.shape != query_BRD.shape[:1]:
        shapes = f"negative_mask {negative_mask.shape} and sources {sources.shape}"
        raise UserError(f"matryoshka_loss: {shapes}: expected {negatives.shape[:2]} and {query_BRD.shape[:1]}")
    groups = validate_groups(groups, query_BRD.shape[1], candidate_BRD.shape[1])
    shards = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in batch_axes]))
    if query_BRD.shape[0] % shards:
        raise UserError(
            f"batch of {query_BRD.shape[0]} pairs does not divide over {shards} shards of the mesh axes {', '.join(batch_axes)}"
        )
    losses_G, accuracies_G = _group_losses(
        query_BRD[:, : groups[-1][0]],
        candidate_BRD[:, : groups[-1][1]],
        negatives[:, :, : groups[-1][1]],
        negative_mask,
        sources,
        jnp.float32(temperature),
        groups=groups,
        mesh=mesh,
        batch_axes=tuple(batch_axes),
        chunk=chunk,
    )
    metrics = {}
    for name, values_G in (("loss", losses_G), ("accuracy", accuracies_G)):
        metrics |= {f"{name}/{r_q}:{r_c}": value for (r_q, r_c), value in zip(groups, values_G, strict=True)}
    return losses_G.mean() if normalization == "code" else losses_G.sum(), metrics


def _check(query, candidate, negatives, normalization, temperature, chunk):
    shapes = f"query {query.shape}, candidate {candidate.shape}, negatives {negatives.shape}"
    if query.ndim != 3 or candidate.ndim != 3 or negatives.ndim != 4:
        raise UserError(f"matryoshka_loss: {shapes}: expected [B, R_q, D], [B, R_c, D] and [B, K, R_c, D]")
    if query.shape[0] == 0 or query.shape[0] != candidate.shape[0] or query.shape[2] != candidate.shape[2]:
        raise UserError(f"matryoshka_loss: {shapes}: queries and candidates must be pairs of one width, at least one")
    if (negatives.shape[0], *negatives.shape[2:]) != candidate.shape:
        raise UserError(f"matryoshka_loss: {shapes}: negatives must be [B, K, R_c, D] of the candidates' B, R_c and D")
    if normalization not in ("code", "paper"):
        raise UserError(f"normalization={normalization!r}: expected 'code' (mean over groups) or 'paper' (sum)")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise UserError(f"temperature={temperature} must be positive")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1 query")


@partial(jax.jit, static_argnames=("groups", "mesh", "batch_axes", "chunk"))
def _group_losses(query_BRD, candidate_BRD, negatives_BKRD, mask_BK, source_B, temperature, *, groups, mesh, batch_axes, chunk):
    """(losses [G], accuracies [G]) over the global batch."""
    if mesh is None:
        counts_BM = jnp.concatenate([source_B[:, None] == source_B, mask_BK], axis=1)
        sums = _sums(query_BRD, candidate_BRD, negatives_BKRD, counts_BM, temperature, 0, groups, chunk)
    else:
        split, whole = PartitionSpec(batch_axes), PartitionSpec()

        @partial(jax.shard_map, mesh=mesh, in_specs=(split, split, split, split, split, whole, whole), out_specs=whole)
        def sums_of_shards(query_BRD, candidate_BRD, negatives_BKRD, mask_BK, source_B, source_N, temperature):
            first = jax.lax.axis_index(batch_axes) * query_BRD.shape[0]
            with jax.named_scope("gather"):
                candidate_NRD = jax.lax.all_gather(candidate_BRD, batch_axes, tiled=True)
            counts_BM = jnp.concatenate([source_B[:, None] == source_N, mask_BK], axis=1)
            sums = _sums(query_BRD, candidate_NRD, negatives_BKRD, counts_BM, temperature, first, groups, chunk)
            return jax.lax.psum(sums, batch_axes)

        sums = sums_of_shards(query_BRD, candidate_BRD, negatives_BKRD, mask_BK, source_B, source_B, temperature)
    return tuple(values_G / query_BRD.shape[0] for values_G in sums)


def _sums(query_BRD, candidate_NRD, negatives_BKRD, counts_BM, temperature, first, groups, chunk):
    """(losses [G], hits [G]) summed over this device's queries; their positives are candidates first, first + 1, ..."""
    queries = query_BRD.shape[0]
    positive_B = first + jnp.arange(queries)
    margins_GBM = _margins(query_BRD, candidate_NRD, negatives_BKRD, positive_B, groups, chunk)
    margins_GBM = jnp.where(counts_BM, margins_GBM, -jnp.inf)
    # The positive's own margin is 0, so minus its log-probability is the log of the sum.
    losses_G = jax.nn.logsumexp(margins_GBM / temperature, axis=2).sum(1)
    is_positive_BM = jnp.arange(margins_GBM.shape[2]) == positive_B[:, None]
    hits_GB = jnp.all(is_positive_BM | (margins_GBM < 0), axis=2)
    return losses_G, hits_GB.astype(jnp.float32).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _margins(query_BRD, candidate_NRD, negatives_BKRD, positive_B, groups, chunk):
    """Every candidate's score minus that of the query's positive, float32 [G, B, N + K].

    Cross-entropy needs no more, and it is more exact: scores near 16 are one float32 step of 1e-6 apart, 3e-5 after
    the temperature, whereas differences of similarities are exact where candidates are close.
    """
    return _forward(query_BRD, candidate_NRD, negatives_BKRD, positive_B, groups, chunk)[0]


def _forward(query_BRD, candidate_NRD, negatives_BKRD, positive_B, groups, chunk):
    size = _chunk_size(query_BRD, candidate_NRD, chunk)
    candidate_blocks = _column_blocks(jnp.swapaxes(candidate_NRD, 0, 1), groups)
    index_dtype = jnp.int8 if groups[-1][1] <= 127 else jnp.int16

    def one_chunk(inputs):
        query_RbD, negatives_JbKD, positive_b = inputs
        negative_blocks = _column_blocks(negatives_JbKD, groups)
        maximum_RbM, winner_RbM, margins, winners = None, None, [], []
        for (r_q, _), (start, end), candidate_JND, negative_JbKD in zip(
            groups, _column_ranges(groups), candidate_blocks, negative_blocks, strict=True
        ):
            if end > start:
                in_block = _similarities(query_RbD, candidate_JND, negative_JbKD)
                columns_J = jnp.arange(start, end, dtype=index_dtype)
                parts = zip(*(_max_and_first(similarity, columns_J) for similarity in in_block), strict=True)
                block_max, block_winner = (jnp.concatenate(part, axis=-1) for part in parts)
                if maximum_RbM is None:
                    maximum_RbM, winner_RbM = block_max, block_winner
                else:  # strictly above: a tie stays with the first vector
                    winner_RbM = jnp.where(block_max > maximum_RbM, block_winner, winner_RbM)
                    maximum_RbM = jnp.maximum(block_max, maximum_RbM)
            of_positive_Rb1 = jnp.take_along_axis(maximum_RbM[:r_q], positive_b[None, :, None], axis=2)
            margins.append((maximum_RbM[:r_q] - of_positive_Rb1).sum(0))
            winners.append(winner_RbM[:r_q])
        return jnp.stack(margins), winners

    inputs = (
        _chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        _chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        _chunks(positive_B, size),
    )
    margins, winners = jax.lax.map(one_chunk, inputs)
    return _unchunk(margins, query_BRD.shape[0], axis=1), (query_BRD, candidate_NRD, negatives_BKRD, positive_B, winners)


def _backward(groups, chunk, residuals, gradient_GBM):
    query_BRD, candidate_NRD, negatives_BKRD, positive_B, winners = residuals
    size = _chunk_size(query_BRD, candidate_NRD, chunk)
    candidate_blocks = _column_blocks(jnp.swapaxes(candidate_NRD, 0, 1), groups)
    # Each margin holds minus the positive's score.
    is_positive_BM = jnp.arange(gradient_GBM.shape[2]) == positive_B[:, None]
    gradient_GBM = gradient_GBM - jnp.where(is_positive_BM, gradient_GBM.sum(2, keepdims=True), 0)

    def one_chunk(candidate_gradients, inputs):
        query_RbD, negatives_JbKD, gradient_GbM, winners = inputs
        coefficients = _block_coefficients(gradient_GbM, winners)
        pieces = zip(_column_ranges(groups), coefficients, candidate_blocks, _column_blocks(negatives_JbKD, groups), strict=True)
        query_gradient, block_gradients, negative_gradients = jnp.zeros(query_RbD.shape, jnp.float32), [], []
        for (columns, (winner_RbM, coefficient_RbM), candidate_JND, negative_JbKD), so_far in zip(
            pieces, candidate_gradients, strict=True
        ):
            dq, dc, dn = _block_gradients(columns, winner_RbM, coefficient_RbM, query_RbD, candidate_JND, negative_JbKD)
            query_gradient += dq
            block_gradients.append(so_far + dc)
            negative_gradients.append(dn)
        return block_gradients, (query_gradient.astype(query_RbD.dtype), jnp.concatenate(negative_gradients))

    inputs = (
        _chunks(jnp.swapaxes(query_BRD, 0, 1), size, axis=1),
        _chunks(jnp.moveaxis(negatives_BKRD, 2, 0), size, axis=1),
        _chunks(gradient_GBM, size, axis=1),
        winners,
    )
    start = [jnp.zeros_like(block, jnp.float32) for block in candidate_blocks]
    candidate_gradients, (query_gradient, negative_gradient) = jax.lax.scan(one_chunk, start, inputs)
    queries = query_BRD.shape[0]
    return (
        jnp.swapaxes(_unchunk(query_gradient, queries, axis=1), 0, 1),
        jnp.swapaxes(jnp.concatenate(candidate_gradients), 0, 1).astype(candidate_NRD.dtype),
        jnp.moveaxis(_unchunk(negative_gradient, queries, axis=1), 0, 2),
        None,
    )


_margins.defvjp(_forward, _backward)


def _block_coefficients(gradient_GbM, winners):
    """For each block of columns: which column of it may have won each row, and the gradient of that similarity.

    Winners of the groups are running ones: all groups that were won inside one block were won by the same column, that of
    the block's own group. So one pair for each block says it all. From the last group back: a group's gradient joins that
    of the next where they share the winner; rows that the group does not use pass on.

    Returns:
      G pairs (column [R, b, M], gradient [R, b, M]); a column outside of the block gives it nothing.
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


def _block_gradients(columns, winner_RbM, coefficient_RbM, query_RbD, candidate_JND, negative_JbKD):
    """Gradients of the queries [R, b, D], the candidates [J, N, D] and the negatives [J, b, K, D] from a block of columns."""
    candidates = candidate_JND.shape[1]
    column_J1 = jnp.arange(*columns, dtype=winner_RbM.dtype)[:, None]

    def similarity_gradient(part):
        # Selecting per part, rather than slicing the whole, keeps each as one pass over its result.
        won = winner_RbM[:, :, None, part] == column_J1
        return jnp.where(won, coefficient_RbM[:, :, None, part], 0).astype(query_RbD.dtype)

    positives_RbJN, negatives_RbJK = similarity_gradient(slice(candidates)), similarity_gradient(slice(candidates, None))
    dq = product("rbjn,jnd->rbd", positives_RbJN, candidate_JND) + product("rbjk,jbkd->rbd", negatives_RbJK, negative_JbKD)
    dc = product("rbjn,rbd->jnd", positives_RbJN, query_RbD)
    dn = product("rbjk,rbd->jbkd", negatives_RbJK, query_RbD)
    return dq, dc, dn.astype(negative_JbKD.dtype)


def _similarities(query_RbD, candidate_JND, negative_JbKD):
    """Float32 similarities [R, b, J, N] to the candidates and [R, b, J, K] to the queries' own negatives."""
    return product("rbd,jnd->rbjn", query_RbD, candidate_JND), product("rbd,jbkd->rbjk", query_RbD, negative_JbKD)


def _max_and_first(similarity_RbJM, columns_J):
    """The maximum over J and its first column. Two plain reductions: XLA's argmax is several times slower on a CPU."""
    maximum_RbM = similarity_RbJM.max(2)
    won = similarity_RbJM == maximum_RbM[:, :, None]
    return maximum_RbM, jnp.where(won, columns_J[:, None], columns_J[-1]).min(2)


def _column_ranges(groups):
    """Columns [start, end) that each group adds to the one before it."""
    ends = [r_c for _, r_c in groups]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _column_blocks(x_J, groups):
    return [x_J[start:end] for start, end in _column_ranges(groups)]


def _chunk_size(query_BRD, candidate_NRD, chunk):
    queries, vectors, width = query_BRD.shape
    if chunk is None:
        bytes_a_query = 4 * vectors * candidate_NRD.shape[0] * candidate_NRD.shape[1]
        rows_as_wide = -(-width // vectors)
        chunk = min(max(CHUNK_BYTES // bytes_a_query, rows_as_wide), WIDE_CHUNK_BYTES // bytes_a_query)
        # As even as can be, so that little is padded.
        chunk = -(-queries // -(-queries // max(chunk, 1)))
    return min(chunk, queries)


def _chunks(x, size, axis=0):
    """[..., B, ...] as [chunks, ..., size, ...]; the last chunk is filled up with zeros, which `_unchunk` cuts off."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :]), axis, 0)


def _unchunk(x, length, axis):
    """[chunks, ..., size, ...] back to [..., length, ...], where `axis` is that of the result."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
