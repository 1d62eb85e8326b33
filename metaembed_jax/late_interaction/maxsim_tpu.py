"""Exact MaxSim of tiles as one TPU kernel. Vectors are read as they are stored; similarities and their maxima stay on the chip.

The kernel reads the queries from HBM once, and of each document its first r_c vectors once for each block of queries; it writes the
scores. A step of the grid (query blocks, tiles, slabs) multiplies some slabs of some tiles by the vectors of a query block, while
the next slabs are copied to the chip:

               slab j = 0           1        ...   of n documents
               +-----------+ +-----------+
               | M x n     | | M x n     |         similarities; M vectors of q queries
               +-----------+ +-----------+
                     \\             |                max over j, in turn
                      `-----> M x n <-'  ------->  sum over i: scores [q, n]

A product of bfloat16 numbers is exact in float32. Float32 numbers are the sums of three in bfloat16, so the kernel multiplies
bfloat16 numbers only: documents are never widened, and sums are float32.

Q queries, T tiles, R vectors of an item, n documents of a tile, D width of a vector, d of a query's, which may be cut; q queries of
a block, and M their vectors.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

from metaembed_jax.late_interaction.sizes import floor_power, round_up

LANES, SUBLANES = 128, 8  # of a vector register of 32-bit numbers
ROWS = 1024  # of query vectors in a product: on every chip, arithmetic then takes longer than reading bfloat16
QUERY_BYTES, BLOCK_BYTES = 6 * 2**20, 4 * 2**20  # large enough that the fixed cost of a step is small next to its work
CHUNK_SLABS, CHUNK_NUMBERS, CHUNK_BYTES = 8, 2**19, 2**21  # slabs, numbers of documents, and similarities of a product
VMEM_COUNTED, VMEM_LIMIT = 12 * 2**20, 48 * 2**20  # v4 has the least memory on the chip, 16 MiB


class Blocks(NamedTuple):
    """Sizes of the kernel's grid.

    Attributes:
      queries: queries of a block.
      rows: vectors of these queries, padded to whole registers.
      tiles: tiles of a step.
      slabs: slabs of each tile in a step; divides r_c, and is r_c if there are several tiles.
      chunk_tiles, chunk_slabs: tiles and slabs of a product; divide those of a step.
      chunk_width: numbers of each vector in a product.
      vmem_bytes: bytes of all blocks and intermediate results; the compiler adds its own.
    """

    queries: int
    rows: int
    tiles: int
    slabs: int
    chunk_tiles: int
    chunk_slabs: int
    chunk_width: int
    vmem_bytes: int


def choose_blocks(
    query_QRD: Array | jax.ShapeDtypeStruct, vectors_TRnD: Array | jax.ShapeDtypeStruct, document_vectors: int
) -> Blocks:
    """Return the blocks for inputs of `score`: the largest that fit; the smallest if even those do not, for a width above 8,192."""
    (Q, Rq, D), (T, _, n, _), dtype = query_QRD.shape, vectors_TRnD.shape, vectors_TRnD.dtype
    parts, document_parts, is_converted = parts_of(query_QRD.dtype), parts_of(dtype), dtype != jnp.bfloat16
    queries = _queries_at_once(Q, min(QUERY_BYTES // (parts * Rq * 2 * D), ROWS // (parts * Rq)))
    rows = round_up(queries * Rq, 2 * SUBLANES)  # registers of bfloat16 have 16 rows
    slab_numbers = n * (D if D % LANES == 0 else round_up(D, 32 // dtype.itemsize))
    chunk_numbers = CHUNK_NUMBERS // document_parts * (1 if is_converted else 2)
    chunk_width = min(max(chunk_numbers // n // LANES, 1) * LANES, D)
    similarity_bytes = 4 * parts * rows * n  # of a slab
    chunk = max(min(CHUNK_SLABS, chunk_numbers // slab_numbers, CHUNK_BYTES // similarity_bytes), 1)
    block_bytes = BLOCK_BYTES
    while True:
        fitting = max(block_bytes // (slab_numbers * dtype.itemsize), 1)
        slabs = _largest_divisor(document_vectors, fitting)
        tiles = floor_power(min(fitting // slabs, T)) if slabs == document_vectors else 1
        chunk_slabs = _largest_divisor(slabs, chunk)
        chunk_tiles = min(floor_power(max(chunk // slabs, 1)), tiles)
        factors = 2 * 4 * n * tiles * (round_up(document_vectors, SUBLANES) + SUBLANES)
        scores = 4 * n * (2 * tiles * round_up(queries, SUBLANES) + chunk_tiles * rows)
        converted = 2 * document_parts * n * chunk_width if is_converted else 0
        products = chunk_tiles * chunk_slabs * (2 * similarity_bytes + converted)
        inputs = 2 * parts * rows * D + 2 * tiles * slabs * slab_numbers * dtype.itemsize
        vmem_bytes = inputs + products + factors + scores
        if vmem_bytes <= VMEM_COUNTED or fitting == 1:
            return Blocks(queries, rows, tiles, slabs, chunk_tiles, chunk_slabs, chunk_width, vmem_bytes)
        block_bytes //= 2


def _queries_at_once(queries: int, most: int) -> int:
    """Return a number of queries for each block: all, or else blocks of about equal sizes, of whole registers if they fit."""
    if most >= queries:
        return queries
    if most < SUBLANES:
        return max(most, 1)
    return round_up(pl.cdiv(queries, pl.cdiv(queries, most // SUBLANES * SUBLANES)), SUBLANES)


def score(
    query_QRD: Float[Array, "Q Rq d"],
    vectors_TRnD: Float[Array, "T R n D"] | Int8[Array, "T R n D"],
    scales_TRn: Float[Array, "T R n"] | None,
    counts_Tn: Int[Array, "T n"] | None,
    document_vectors: int,
    *,
    interpret: bool = False,
) -> Float[Array, "Q N"]:
    """Score every query against every document of all tiles, N = T * n; products and sums are float32.

    All tiles of a device are scored in one call, because a slice of them would be copied first.

    Args:
      query_QRD: float32 or bfloat16; if they are cut, only the first numbers of the documents' vectors are read.
      vectors_TRnD: float32, bfloat16 or int8; n is 128.
      scales_TRn: factors of the vectors, float32, not negative. They are applied to the similarities.
      counts_Tn: vectors of each document; a document with 0 scores -inf. None if all documents have all R.
      document_vectors: r_c, the vectors to use of each document, from the first; only these are read.
      interpret: use Pallas' interpreter, which runs on any device.
    """
    query_QRD = pad_to_read(query_QRD, vectors_TRnD)
    blocks = choose_blocks(query_QRD, vectors_TRnD, document_vectors)
    (Q, Rq, D), (T, _, n, full) = query_QRD.shape, vectors_TRnD.shape
    query_blocks = pl.cdiv(Q, blocks.queries)
    is_wide = full % LANES == 0
    query_bPMD = query_parts(query_QRD, blocks)
    inputs = [query_bPMD, vectors_TRnD if is_wide else jnp.swapaxes(vectors_TRnD, 2, 3)]  # as XLA stores it: nothing is copied
    specs = [
        # The next queries are needed only after all documents, so a second buffer would be idle.
        pl.BlockSpec((None, *query_bPMD.shape[1:]), lambda block, tile, slab: (block, 0, 0), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((blocks.tiles, blocks.slabs, *((n, D) if is_wide else (D, n))), lambda block, tile, slab: (tile, slab, 0, 0)),
    ]
    if scales_TRn is not None:
        few = document_vectors < SUBLANES  # their registers would be mostly scales that are not used
        inputs.append(scales_TRn[:, :document_vectors] if few else scales_TRn)
        rows = min(round_up(document_vectors, SUBLANES), inputs[-1].shape[1])
        specs.append(pl.BlockSpec((blocks.tiles, rows, n), lambda block, tile, slab: (tile, 0, 0)))
    if counts_Tn is not None:
        inputs.append(counts_Tn)
        rows = max(blocks.tiles, min(SUBLANES, T))
        specs.append(pl.BlockSpec((rows, n), lambda block, tile, slab: (jax.lax.div(tile * blocks.tiles, rows), 0)))
    has = {"has_scales": scales_TRn is not None, "has_counts": counts_Tn is not None}
    scores_bqN = pl.pallas_call(
        partial(_kernel, blocks=blocks, query_vectors=Rq, is_wide=is_wide, **has),
        grid=(query_blocks, pl.cdiv(T, blocks.tiles), document_vectors // blocks.slabs),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, blocks.queries, blocks.tiles * n), lambda block, tile, slab: (block, 0, tile)),
        out_shape=jax.ShapeDtypeStruct((query_blocks, blocks.queries, T * n), jnp.float32),
        scratch_shapes=[pltpu.VMEM((blocks.chunk_tiles, blocks.rows, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(query_bPMD, inputs[1:], T * n, document_vectors, blocks),
        interpret=interpret,
        name="maxsim",
    )(*inputs)
    return scores_bqN.reshape(-1, T * n)[:Q]


def pad_to_read(query_QRD: Array, vectors_TRnD: Array) -> Float[Array, "Q Rq D"]:
    """Pad queries that are cut with zeros to the numbers that are read of a document: whole registers, as they are stored."""
    full, dtype = vectors_TRnD.shape[3], vectors_TRnD.dtype
    read = min(round_up(query_QRD.shape[2], LANES if full % LANES == 0 else 32 // dtype.itemsize), full)
    return jnp.pad(query_QRD, [(0, 0), (0, 0), (0, read - query_QRD.shape[2])])


def _kernel(query_ref, document_ref, *refs, blocks, query_vectors, is_wide, has_scales, has_counts):
    refs = list(refs)
    scale_ref = refs.pop(0) if has_scales else None
    count_ref = refs.pop(0) if has_counts else None
    score_ref, best_ref = refs
    tile_block, slab_block = pl.program_id(1), pl.program_id(2)

    def masked(similarity, tile, slab):
        j = slab_block * blocks.slabs + slab
        if scale_ref is not None:
            similarity *= scale_ref[tile, pl.ds(j, 1), :]
        if count_ref is not None:
            row = jax.lax.rem(tile_block * blocks.tiles, count_ref.shape[0]) + tile
            similarity = jnp.where(j < count_ref[pl.ds(row, 1), :], similarity, -jnp.inf)
        return similarity

    @pl.loop(0, blocks.tiles // blocks.chunk_tiles)
    def _(chunk):
        first = chunk * blocks.chunk_tiles

        @pl.when(slab_block == 0)
        def _():
            best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, jnp.float32)

        raise_maxima(best_ref, query_ref, document_ref, first, masked, blocks, is_wide)

        @pl.when(slab_block == pl.num_programs(2) - 1)
        def _():
            for tile in range(blocks.chunk_tiles):
                columns = pl.ds(pl.multiple_of((first + tile) * LANES, LANES), LANES)
                score_ref[:, columns] = sum_over_queries(best_ref.at[tile], blocks.queries, query_vectors)


def raise_maxima(best_ref, query_ref, document_ref, first, masked, blocks, is_wide):
    """Raise maxima [tiles of a chunk, M, n] by the similarities of all slabs of a step.

    Args:
      query_ref: [P * M, D], bfloat16, the largest part first.
      document_ref: [tiles, slabs, n, D] if documents are wide, or else [tiles, slabs, D, n].
      first: the first tile of the chunk.
      masked: `(similarity [M, n], tile, slab) -> similarity`; applies scales and counts.
    """

    @pl.loop(0, blocks.slabs // blocks.chunk_slabs)
    def _(chunk):
        slab = chunk * blocks.chunk_slabs
        documents = document_ref.at[pl.ds(first, blocks.chunk_tiles), pl.ds(slab, blocks.chunk_slabs)]
        similarities = _similarities(query_ref, documents, blocks, is_wide)
        for a in range(blocks.chunk_tiles):
            best = best_ref[a]
            for b in range(blocks.chunk_slabs):
                best = jnp.maximum(best, masked(similarities[a * blocks.chunk_slabs + b], first + a, slab + b))
            best_ref[a] = best


def _similarities(query_ref, document_ref, blocks, is_wide):
    """Return similarities [M, n] of each slab of a chunk, float32."""
    width = document_ref.shape[3 if is_wide else 2]
    totals = [None] * (blocks.chunk_tiles * blocks.chunk_slabs)
    for start in range(0, width, blocks.chunk_width):
        columns = slice(start, min(start + blocks.chunk_width, width))
        documents = document_ref[:, :, :, columns] if is_wide else document_ref[:, :, columns, :]
        for number, part in enumerate(split(documents.reshape(-1, *documents.shape[2:]))):
            # Products of two small parts are below float32's precision.
            query = query_ref[: max(query_ref.shape[0] - number * blocks.rows, blocks.rows), columns]
            for slab, product in enumerate(_products(query, part, is_wide)):
                for row in reversed(range(0, product.shape[0], blocks.rows)):  # the smallest first
                    term = product[row : row + blocks.rows]
                    totals[slab] = term if totals[slab] is None else totals[slab] + term
    return totals


def _products(query, documents, is_wide):
    """Return the products of some rows with each slab, [rows, n]."""
    if not is_wide:
        return [_dot(query, slab, 0) for slab in documents]
    slabs, n, width = documents.shape
    product = _dot(query, documents.reshape(-1, width), 1)
    return [product[:, slab * n : (slab + 1) * n] for slab in range(slabs)]


def _dot(query, documents, axis):
    contract = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(query, documents, contract, preferred_element_type=jnp.float32)


def sum_over_queries(best_ref, queries, query_vectors):
    """Return sums [q, n] of rows [M, n], which are in the order of the queries.

    Terms are added in turn, so that a sum is the same bits for any number of queries.
    """

    def add(i, total):
        rows = pl.ds(i, queries, stride=query_vectors) if queries > 1 and query_vectors > 1 else pl.ds(i, queries)
        return total + best_ref[rows, :]

    return jax.lax.fori_loop(0, query_vectors, add, jnp.zeros((queries, best_ref.shape[1]), jnp.float32), unroll=True)


def query_parts(query_QRD: Array, blocks: Blocks):
    """Return the queries in blocks of P * M rows of bfloat16, [blocks, P * M, D]: all rows of the largest part first."""
    Q, Rq, D = query_QRD.shape
    query_QRD = jnp.pad(query_QRD, [(0, -Q % blocks.queries), (0, 0), (0, 0)])
    rows_bMD = query_QRD.reshape(-1, blocks.queries * Rq, D)
    rows_bMD = jnp.pad(rows_bMD, [(0, 0), (0, blocks.rows - rows_bMD.shape[1]), (0, 0)])
    return jnp.concatenate(split(rows_bMD), axis=1)


def split(x: Array) -> list[Array]:
    """Return bfloat16 arrays whose sum is x, the largest first: three for float32, one for other types, which bfloat16 holds."""
    if x.dtype != jnp.float32:
        return [x.astype(jnp.bfloat16)]
    parts = []
    for _ in range(3):  # of 8 bits; cut, because a compiler may leave out a conversion to bfloat16 and back
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def parts_of(dtype) -> int:
    """Return the number of bfloat16 parts of a type."""
    return 3 if dtype == jnp.float32 else 1


def _cost(query_bPMD: Array, documents: list[Array], N: int, document_vectors: int, blocks: Blocks) -> pl.CostEstimate:
    """Estimate the kernel's cost, for the compiler and the planner. Fewer than 128 rows take the time of 128."""
    query_blocks, rows, width = query_bPMD.shape
    read = document_vectors * width * documents[0].dtype.itemsize + 4 * (len(documents) - 1) * document_vectors
    numbers = query_blocks * N * document_vectors * width
    moved = query_bPMD.size * 2 + query_blocks * N * (read + 4 * blocks.queries)
    return pl.CostEstimate(flops=2 * round_up(rows, LANES) * numbers, bytes_accessed=moved, transcendentals=0)


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
