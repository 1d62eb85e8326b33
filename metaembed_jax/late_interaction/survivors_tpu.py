"""Exact MaxSim of the survivors of each query as one TPU kernel, which fetches them from the tiles where they are stored.

A row of a slab of [n, D] shares 32-bit words with its neighbours if its numbers are narrower, so a fetch takes w = 1, 2 or 4 rows
for float32, bfloat16 and int8. The fetched rows of n / w survivors are a tile on the chip, which is scored as in `maxsim_tpu`;
the scores of neighbours are dropped. Nothing is gathered in HBM. While a step's slabs are scored, the next are fetched.

If the width is not a multiple of 128, documents are columns in memory, and 128 are the least to fetch. So all are scored.

Q queries, K survivors, T tiles, R vectors of an item, n documents of a tile, D width of a vector, d of a query's; C tiles on the
chip of a query.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

from metaembed_jax.late_interaction import maxsim_tpu
from metaembed_jax.late_interaction.maxsim_tpu import LANES, Blocks
from metaembed_jax.late_interaction.sizes import round_up

SLOTS = 2**17  # of a call; they take half of the scalar memory


def score_survivors(
    query_QRD: Float[Array, "Q Rq d"],
    vectors_TRnD: Float[Array, "T R n D"] | Int8[Array, "T R n D"],
    scales_TRn: Float[Array, "T R n"] | None,
    counts_Tn: Int[Array, "T n"] | None,
    slots_QK: Int[Array, "Q K"],
    document_vectors: int,
    *,
    expected: float,
    interpret: bool = False,
) -> Float[Array, "Q K"]:
    """Score each query against its survivors among the documents of all tiles; products and sums are float32.

    Args:
      query_QRD, vectors_TRnD, scales_TRn, counts_Tn, document_vectors, interpret: as in `maxsim_tpu.score`.
      slots_QK: tile * n + row of each survivor, int32; -1 for those on other devices, which score -inf. Those before the first and
        after the last of this device are not fetched.
      expected: survivors of a query on this device on average, for the estimate of the kernel's cost.
    """
    if vectors_TRnD.shape[3] % LANES:
        scores_QN = maxsim_tpu.score(query_QRD, vectors_TRnD, scales_TRn, counts_Tn, document_vectors, interpret=interpret)
        return jnp.where(slots_QK < 0, -jnp.inf, jnp.take_along_axis(scores_QN, slots_QK, axis=1))
    Q, K = slots_QK.shape
    chunk = min(K, SLOTS)
    chunks, at_once = pl.cdiv(K, chunk), SLOTS // chunk
    arrays = vectors_TRnD, None if scales_TRn is None else scales_TRn[:, :document_vectors], counts_Tn

    def score(query_and_slots: tuple[Array, Array]) -> Array:
        return _score_run(*query_and_slots, *arrays, document_vectors, expected / chunks, interpret)

    if Q * chunks <= at_once:
        return score((query_QRD, slots_QK))
    slots_XK = jnp.pad(slots_QK, [(0, 0), (0, -K % chunk)], constant_values=-1).reshape(-1, chunk)
    padding = -len(slots_XK) % at_once
    slots_XK = jnp.pad(slots_XK, [(0, padding), (0, 0)], constant_values=-1)
    query_XRD = jnp.pad(jnp.repeat(query_QRD, chunks, axis=0), [(0, padding), (0, 0), (0, 0)])
    groups = (x.reshape(-1, at_once, *x.shape[1:]) for x in (query_XRD, slots_XK))
    return jax.lax.map(score, tuple(groups)).reshape(-1, chunks * chunk)[:Q, :K]


def _score_run(query_QRD, slots_QK, vectors_TRnD, scales_TRn, counts_Tn, document_vectors, expected, interpret):
    """Return the scores of survivors; those from this device's first to its last are fetched."""
    (Q, K), n = slots_QK.shape, vectors_TRnD.shape[2]
    query_QRD, rows = maxsim_tpu.pad_to_read(query_QRD, vectors_TRnD), _rows_of_a_fetch(vectors_TRnD.dtype)
    blocks = maxsim_tpu.choose_blocks(query_QRD[:1], vectors_TRnD, document_vectors)._replace(tiles=1, chunk_tiles=1)
    is_here_QK, column_K = slots_QK >= 0, jnp.arange(K)
    first_Q1, end_Q1 = jnp.argmax(is_here_QK, axis=1)[:, None], K - jnp.argmax(is_here_QK[:, ::-1], axis=1)[:, None]
    length_Q = jnp.where(is_here_QK.any(axis=1), (end_Q1 - first_Q1)[:, 0], 0).astype(jnp.int32)
    run_QK = jnp.take_along_axis(jnp.maximum(slots_QK, 0), (column_K + first_Q1) % K, axis=1)
    run_QK = jnp.pad(run_QK, [(0, 0), (0, -K % (n // rows))])
    scales = None if scales_TRn is None else _scales(scales_TRn, run_QK, rows)
    counts = None if counts_Tn is None else _repeated(counts_Tn.reshape(-1)[run_QK], rows, n)
    cost = _cost(query_QRD, vectors_TRnD, scales, document_vectors, expected)
    prefetched = length_Q, run_QK
    scores_QCn = _fetch_and_score(prefetched, query_QRD, vectors_TRnD, scales, counts, document_vectors, blocks, cost, interpret)
    scores_QKw = scores_QCn.reshape(Q, -1, rows)
    scores_QK = jnp.take_along_axis(scores_QKw, run_QK[:, :, None] % rows, axis=2)[:, :, 0]
    scores_QK = jnp.take_along_axis(scores_QK, (column_K - first_Q1) % K, axis=1)
    return jnp.where(is_here_QK, scores_QK, -jnp.inf)


def _fetch_and_score(prefetched, query_QRD, vectors_TRnD, scales_QCRn, counts_QCn, document_vectors, blocks, cost, interpret):
    """Return the scores of fetched tiles, [Q, C, n]; those of rows that are not fetched are not written."""
    (Q, Rq, D), n, dtype = query_QRD.shape, vectors_TRnD.shape[2], vectors_TRnD.dtype
    tiles = prefetched[1].shape[1] * _rows_of_a_fetch(dtype) // n
    inputs = [maxsim_tpu.query_parts(query_QRD, blocks), vectors_TRnD]
    specs = [
        pl.BlockSpec((None, *inputs[0].shape[1:]), lambda query, *_: (query, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if scales_QCRn is not None:
        inputs.append(scales_QCRn)
        specs.append(pl.BlockSpec((None, 1, document_vectors, n), lambda query, tile, *_: (query, tile, 0, 0)))
    if counts_QCn is not None:
        inputs.append(counts_QCn)
        specs.append(pl.BlockSpec((None, tiles, n), lambda query, *_: (query, 0, 0)))
    has = {"has_scales": scales_QCRn is not None, "has_counts": counts_QCn is not None}
    return pl.pallas_call(
        partial(_kernel, blocks=blocks, query_vectors=Rq, **has),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(Q, tiles, document_vectors // blocks.slabs),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, tiles, n), lambda query, *_: (query, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, blocks.slabs, n, D), dtype),
                pltpu.VMEM((1, blocks.rows, n), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((Q, tiles, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=maxsim_tpu.VMEM_LIMIT
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="maxsim_of_survivors",
    )(*prefetched, *inputs)


def _kernel(length_ref, slot_ref, query_ref, vector_ref, *refs, blocks: Blocks, query_vectors, has_scales, has_counts):
    refs = list(refs)
    scale_ref = refs.pop(0) if has_scales else None
    count_ref = refs.pop(0) if has_counts else None
    score_ref, document_ref, best_ref, semaphore = refs
    query, tile, slab_block = (pl.program_id(axis) for axis in range(3))
    tiles, slab_blocks = pl.num_programs(1), pl.num_programs(2)
    step = (query * tiles + tile) * slab_blocks + slab_block
    buffer = jax.lax.rem(step, 2)
    fetch = partial(_fetch, length_ref, slot_ref, vector_ref, document_ref, semaphore, tiles, slab_blocks)

    @pl.when(step == 0)
    def _():
        fetch(0, "start")

    @pl.when(step + 1 < pl.num_programs(0) * tiles * slab_blocks)
    def _():
        fetch(step + 1, "start")

    fetch(step, "wait")

    def masked(similarity, _, slab):
        j = slab_block * blocks.slabs + slab
        if scale_ref is not None:
            similarity *= scale_ref[0, pl.ds(j, 1), :]
        if count_ref is not None:
            similarity = jnp.where(j < count_ref[pl.ds(tile, 1), :], similarity, -jnp.inf)
        return similarity

    @pl.when(slab_block == 0)
    def _():
        best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, jnp.float32)

    @pl.when(tile * (LANES // _rows_of_a_fetch(document_ref.dtype)) < length_ref[query])
    def _():
        documents = document_ref.at[pl.ds(buffer, 1)]
        maxsim_tpu.raise_maxima(best_ref, query_ref, documents, 0, masked, blocks, is_wide=True)

    @pl.when(slab_block == slab_blocks - 1)
    def _():
        score_ref[pl.ds(tile, 1), :] = maxsim_tpu.sum_over_queries(best_ref.at[0], 1, query_vectors)


def _fetch(length_ref, slot_ref, vector_ref, document_ref, semaphore, tiles, slab_blocks, step, act):
    """Start or await the copies of a step: some slabs of as many survivors as a tile on the chip has."""
    _, slabs, n, width = document_ref.shape
    rows = _rows_of_a_fetch(document_ref.dtype)
    survivors = n // rows
    query, tile = jax.lax.div(step, tiles * slab_blocks), jax.lax.rem(jax.lax.div(step, slab_blocks), tiles)
    first, slab, buffer = tile * survivors, jax.lax.rem(step, slab_blocks) * slabs, jax.lax.rem(step, 2)

    @pl.loop(0, jnp.clip(length_ref[query] - first, 0, survivors))
    def _(i):
        slot = slot_ref[query, first + i]
        row = pl.multiple_of(jax.lax.div(jax.lax.rem(slot, n), rows) * rows, rows)
        source = vector_ref.at[jax.lax.div(slot, n), pl.ds(slab, slabs), pl.ds(row, rows), pl.ds(0, width)]
        target = document_ref.at[buffer, :, pl.ds(pl.multiple_of(i * rows, rows), rows)]
        copy = pltpu.make_async_copy(source, target, semaphore.at[buffer])
        copy.start() if act == "start" else copy.wait()


def _scales(scales_TRn: Array, slots_QK: Array, rows: int) -> Float[Array, "Q C R n"]:
    """Return the scales of survivors; the neighbours that are fetched with them get the same."""
    n = scales_TRn.shape[2]
    tile_QK, row_QK = jnp.divmod(slots_QK, n)
    scales_QCRn = _repeated(scales_TRn[tile_QK, :, row_QK].swapaxes(1, 2), rows, n)
    return jnp.moveaxis(scales_QCRn, 1, 2)


def _repeated(x_K: Array, rows: int, n: int) -> Array:
    """Repeat entries of the last axis for each row that is fetched with them, and split it into tiles."""
    repeated = jnp.repeat(x_K, rows, axis=-1)
    return repeated.reshape(*x_K.shape[:-1], -1, n)


def _cost(query_QRD: Array, vectors_TRnD: Array, scales_QCRn: Array | None, document_vectors: int, expected: float):
    """Estimate the kernel's cost. Fewer than 128 rows of a query take the time of 128."""
    (Q, Rq, D), rows = query_QRD.shape, _rows_of_a_fetch(vectors_TRnD.dtype)
    parts = maxsim_tpu.parts_of(query_QRD.dtype)
    numbers = Q * expected * rows * document_vectors * D
    moved = numbers * vectors_TRnD.dtype.itemsize + 2 * parts * query_QRD.size
    moved += 0 if scales_QCRn is None else 4 * scales_QCRn.size
    return pl.CostEstimate(flops=int(2 * round_up(parts * Rq, LANES) * numbers), bytes_accessed=int(moved), transcendentals=0)


def _rows_of_a_fetch(dtype) -> int:
    return 4 // dtype.itemsize
