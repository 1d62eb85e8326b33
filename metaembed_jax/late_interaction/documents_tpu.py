"""Exact MaxSim of documents in an array [N, R, D] as one TPU kernel. Similarities and their maxima stay on the chip.

The kernel reads the queries from HBM once, and the documents once for each block of queries; it writes the scores. A step of the
grid (query blocks, tiles, steps) multiplies all vectors of n documents by those of q queries, at full width, while the next
documents are copied to the chip:

                  slab i = 0     1    ...
                    +---------+---------+-----+
    document 0      | r_c x q |         |     |               +----------------+
              1     |         | similarities  |  max over j   | n documents    | step s        sum of slabs
             ...    |         |         |     | ------------> +----------------+            ---------------> scores [q, tile]
             n-1    |         |         |     |               | the next n     | step s + 1
                    +---------+---------+-----+               +----------------+
                       M columns, r_q slabs of q                best of a tile

At least 128 scores of a row are written at once. If 128 documents do not fit, a tile has several steps. Float32 queries are split
into three parts in bfloat16, as in `maxsim_tpu`, unless the documents are float32.

Q queries, N documents, R vectors of an item, D width of a vector; P parts of the queries; M columns: the vectors of a query block,
padded to whole registers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from metaembed_jax.late_interaction import maxsim_tpu
from metaembed_jax.late_interaction.maxsim_tpu import LANES, SUBLANES, VMEM_COUNTED, VMEM_LIMIT
from metaembed_jax.late_interaction.sizes import floor_power, round_up

COLUMNS = 1024  # on every chip, arithmetic then takes longer than reading the documents, so more would not help
# Large enough that the fixed cost of a step is small next to its work. Float32 takes twice the memory that is counted, because its
# products have several passes. The largest blocks fit v4, which has the least memory on the chip (16 MiB).
BLOCK_BYTES = {jnp.dtype("bfloat16"): 4 * 2**20, jnp.dtype("float32"): 2 * 2**20}
PRODUCT_NUMBERS = 2**19  # of documents that are converted and multiplied at once


class DocumentBlocks(NamedTuple):
    """Sizes of the kernel's grid.

    Attributes:
      queries: queries of a block.
      columns: vectors of these queries, padded to whole registers.
      step: documents of a step.
      tile: documents whose scores are written together.
      vmem_bytes: bytes of all blocks and intermediate results; the compiler adds its own.
    """

    queries: int
    columns: int
    step: int
    tile: int
    vmem_bytes: int


def choose_blocks(query_QRD: Array | jax.ShapeDtypeStruct, document_NRD: Array | jax.ShapeDtypeStruct) -> DocumentBlocks | None:
    """Return the blocks for inputs of `score`; None if even the smallest are too large."""
    query_QRD, document_NRD = jax.eval_shape(_whole_registers, query_QRD, document_NRD)
    (Q, Rq, D), (N, Rc, _) = query_QRD.shape, document_NRD.shape
    document_bytes = D * document_NRD.dtype.itemsize  # of a vector
    query_bytes = 2 * _parts(query_QRD.dtype, document_NRD.dtype) * D if document_NRD.dtype != jnp.float32 else 4 * D
    most = BLOCK_BYTES[jnp.dtype("float32") if document_NRD.dtype == jnp.float32 else jnp.dtype("bfloat16")]
    most_queries = max(min(COLUMNS, most // query_bytes) // Rq // SUBLANES * SUBLANES, SUBLANES)
    queries = round_up(pl.cdiv(Q, pl.cdiv(Q, most_queries)), SUBLANES)
    columns = round_up(Rq * queries, LANES)
    fitting = min(most // document_bytes, most // (4 * columns)) // Rc
    step = max(floor_power(min(fitting, N)), SUBLANES)  # a power of two divides a tile, or is one
    while True:
        tile = max(step, LANES)
        numbers = columns * (step * Rc + tile) + tile * (round_up(Rc, LANES) + 2 * round_up(Rc, SUBLANES) + 2 * queries)  # float32
        vmem_bytes = columns * query_bytes + 2 * step * Rc * document_bytes + 4 * numbers
        if vmem_bytes <= VMEM_COUNTED:
            return DocumentBlocks(queries, columns, step, tile, vmem_bytes)
        if step == SUBLANES:
            return None
        step //= 2


def score(
    query_QRD: Float[Array, "Q Rq D"],
    document_NRD: Float[Array, "N Rc D"] | Int[Array, "N Rc D"],
    mask_NR: Bool[Array, "N Rc"] | None = None,
    scale_NR: Float[Array, "N Rc"] | None = None,
    *,
    blocks: DocumentBlocks,
    interpret: bool = False,
) -> Float[Array, "Q N"]:
    """Score every query against every document; products and sums are float32.

    Queries in float32 or bfloat16, and documents in float32, bfloat16 or int8, are read in place if their width is a multiple of
    128; others are converted or padded in a copy first.

    Args:
      query_QRD, document_NRD: arrays without empty axes.
      mask_NR: False marks padding, which is never a maximum. A document of padding alone scores -inf.
      scale_NR: a factor for each document vector, not negative. It is applied to the similarities.
      blocks: from `choose_blocks` for these arrays.
      interpret: use Pallas' interpreter, which runs on any device.
    """
    products = query_QRD.size * document_NRD.shape[0] * document_NRD.shape[1]
    query_QRD, document_NRD = _whole_registers(query_QRD, document_NRD)
    (Q, Rq, D), (N, Rc, _) = query_QRD.shape, document_NRD.shape
    query_blocks, tiles, steps = pl.cdiv(Q, blocks.queries), pl.cdiv(N, blocks.tile), blocks.tile // blocks.step
    last = pl.cdiv(N, blocks.step) - 1
    document_major = _is_document_major(Rc, document_NRD.dtype.itemsize)

    def document_index(query_block, tile, step):
        block = jnp.minimum(tile * steps + step, last)  # the last tile may read a block twice; its scores are not written
        return (block, 0, 0) if document_major else (0, block, 0)

    columns_bPDM = _columns(query_QRD, blocks, _parts(query_QRD.dtype, document_NRD.dtype))
    inputs = [columns_bPDM, document_NRD if document_major else jnp.swapaxes(document_NRD, 0, 1)]
    specs = [
        # The next queries are needed only after all documents, so a second buffer would be idle.
        pl.BlockSpec((None, *columns_bPDM.shape[1:]), lambda block, tile, step: (block, 0, 0, 0), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((blocks.step, Rc, D) if document_major else (Rc, blocks.step, D), document_index),
    ]
    scratch = [(blocks.columns // LANES, blocks.step * Rc, LANES), (blocks.tile, blocks.columns)]
    if mask_NR is not None or scale_NR is not None:
        # Registers run along documents; along few vectors they would be mostly padding.
        inputs.append(_factors((N, Rc), mask_NR, scale_NR).T)
        specs.append(pl.BlockSpec((Rc, blocks.tile), lambda block, tile, step: (0, tile)))
        scratch.append((blocks.tile, Rc))
    return pl.pallas_call(
        partial(_kernel, blocks=blocks, query_vectors=Rq, document_major=document_major),
        grid=(query_blocks, tiles, steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.queries, blocks.tile), lambda block, tile, step: (block, tile)),
        out_shape=jax.ShapeDtypeStruct((Q, N), jnp.float32),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(products, query_QRD, document_NRD, blocks),
        interpret=interpret,
        name="maxsim",
    )(*inputs)


def _kernel(query_ref, document_ref, *refs, blocks, query_vectors, document_major):
    has_factors = len(refs) == 5
    factors = (refs[0], refs[-1]) if has_factors else None
    score_ref, similarity_ref, best_ref = refs[1:4] if has_factors else refs[:3]
    step, n = pl.program_id(2), blocks.step
    if factors is not None:
        factor_ref, column_ref = factors

        @pl.when(step == 0)
        def _():
            column_ref[...] = factor_ref[...].T

    _write_similarities(query_ref, document_ref, similarity_ref)
    documents = pl.ds(pl.multiple_of(step * n, n), n)
    document_vectors = document_ref.shape[1 if document_major else 0]

    @pl.loop(0, similarity_ref.shape[0], unroll=True)  # a Python loop would be traced many times, which is slow on any device
    def _(register):
        def larger(j, best):
            rows = pl.ds(j, n, stride=document_vectors) if document_major else pl.ds(j * n, n)
            similarity = similarity_ref.at[register][rows, :]
            if factors is not None:
                factor = factors[1][documents, pl.ds(j, 1)]
                similarity = jnp.where(factor < 0, -jnp.inf, similarity * factor)
            return jnp.maximum(best, similarity)

        best = jax.lax.fori_loop(0, document_vectors, larger, jnp.full((n, LANES), -jnp.inf), unroll=True)
        best_ref[documents, pl.ds(pl.multiple_of(register * LANES, LANES), LANES)] = best

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        columns = best_ref[...].T
        score_ref[...] = sum(columns[i * blocks.queries : (i + 1) * blocks.queries] for i in range(query_vectors))


def _write_similarities(query_ref, document_ref, similarity_ref):
    """Write all similarities, one register of columns after another, so that every R-th row can be read."""
    first, second, width = document_ref.shape
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None  # by default float32 is rounded to bfloat16
    # A product loads the query's columns for every chunk, so chunks are large. A whole block would not fit if it is converted, or
    # multiplied in the several passes of float32.
    is_bfloat16 = document_ref.dtype == jnp.bfloat16
    chunk = max(PRODUCT_NUMBERS * (2 if is_bfloat16 else 1) // (second * width), 1)
    for start in range(0, first, chunk):
        document = document_ref[start : start + chunk].astype(query_ref.dtype).reshape(-1, width)
        products = [
            jnp.dot(document, query_ref[part], precision=precision, preferred_element_type=jnp.float32)
            for part in reversed(range(query_ref.shape[0]))  # the smallest first
        ]
        similarity = sum(products[1:], products[0])
        rows = slice(start * second, start * second + document.shape[0])
        for register in range(similarity_ref.shape[0]):
            similarity_ref[register, rows] = similarity[:, register * LANES : (register + 1) * LANES]


def _cost(products: int, query_QRD: Array, document_NRD: Array, blocks: DocumentBlocks) -> pl.CostEstimate:
    """Estimate the kernel's cost, for the compiler and the planner; the factors are small next to the documents."""
    queries, _, width = query_QRD.shape
    query_blocks = pl.cdiv(queries, blocks.queries)
    columns_bytes = width * blocks.columns * max(query_QRD.dtype.itemsize, 2 * _parts(query_QRD.dtype, document_NRD.dtype))
    moved = query_blocks * (columns_bytes + document_NRD.size * document_NRD.dtype.itemsize) + 4 * queries * document_NRD.shape[0]
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)


def _columns(query_QRD: Array, blocks: DocumentBlocks, parts: int) -> Float[Array, "blocks P D M"]:
    """Order columns by vector: the first vectors of q queries, then their second, and so on. A sum over i then adds whole slabs."""
    queries, vectors, width = query_QRD.shape
    query_QRD = jnp.pad(query_QRD, [(0, -queries % blocks.queries), (0, 0), (0, 0)])
    columns = query_QRD.reshape(-1, blocks.queries, vectors, width).transpose(0, 3, 2, 1)
    columns = columns.reshape(-1, width, vectors * blocks.queries)
    columns = jnp.pad(columns, [(0, 0), (0, 0), (0, blocks.columns - columns.shape[2])])
    return jnp.stack(maxsim_tpu.split(columns), axis=1) if parts > 1 else columns[:, None]


def _parts(query_type, document_type) -> int:
    """Return the parts of the queries; float32 documents are multiplied by whole float32 queries."""
    return 1 if document_type == jnp.float32 else maxsim_tpu.parts_of(query_type)


def _factors(shape: tuple[int, int], mask_NR: Array | None, scale_NR: Array | None) -> Float[Array, "N R"]:
    """Return the factors of similarities; -1 for padding."""
    factor_NR = jnp.ones(shape, jnp.float32) if scale_NR is None else scale_NR.astype(jnp.float32)
    return factor_NR if mask_NR is None else jnp.where(mask_NR, factor_NR, -1)


def _whole_registers(query_QRD: Array, document_NRD: Array) -> tuple[Array, Array]:
    """Convert queries and documents to types that the kernel takes, and pad them with zeros to whole registers."""
    if document_NRD.dtype not in (jnp.int8, jnp.bfloat16):
        document_NRD = document_NRD.astype(jnp.float32)
    narrow = query_QRD.dtype == jnp.bfloat16 and document_NRD.dtype != jnp.float32
    query_QRD = query_QRD.astype(jnp.bfloat16 if narrow else jnp.float32)
    padding = [(0, 0), (0, 0), (0, -query_QRD.shape[2] % LANES)]
    return jnp.pad(query_QRD, padding), jnp.pad(document_NRD, padding)


def _is_document_major(vectors: int, itemsize: int) -> bool:
    """Return whether XLA stores [N, R, D] in this order, not as [R, N, D]; the kernel reads either in place."""
    return vectors % SUBLANES == 0 or (vectors in (1, 2, 4) and vectors * itemsize >= 4)
