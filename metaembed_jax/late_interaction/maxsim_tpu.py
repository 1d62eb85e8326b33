"""Exact MaxSim as one kernel of a TPU: similarities, their maximum and its sum never leave the chip.

HBM is read for the queries once, and for the candidates once for every block of queries; it is written for the scores. A step of
the grid (query blocks, tiles, steps) multiplies all vectors of n candidates with all of q queries, at their whole width, while the
next candidates arrive:

                  slab i = 0     1    ...
                    +---------+---------+-----+
    candidate 0     | r_c x q |         |     |               +----------------+
              1     |         | similarities  |  max over j   | n candidates   | step s        sum of slabs
             ...    |         |         |     | ------------> +----------------+            ---------------> scores [q, tile]
             n-1    |         |         |     |               | the next n     | step s + 1
                    +---------+---------+-----+               +----------------+
                       M columns, r_q slabs of q                best of a tile

A row of scores is written in pieces of 128 at least; where that many candidates are too much at once, a tile has several steps.

Q queries, N candidates, R vectors of an item, D their width; M columns: the vectors of a query block, filled up to registers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES, SUBLANES = 128, 8  # of a vector register of 32-bit numbers
COLUMNS = 1024  # with so many, arithmetic takes longer than reading the candidates on every chip: more would save nothing
# Large enough that a step's fixed cost is small beside its work. Float32 takes twice what is counted, for its products in parts.
# Compiled for v4, whose memory on the chip is the smallest (16 MiB), the largest that are allowed fit.
BLOCK_BYTES = {jnp.dtype("bfloat16"): 4 * 2**20, jnp.dtype("float32"): 2 * 2**20}
PRODUCT_NUMBERS = 2**19  # of candidates, that are converted and multiplied at once
VMEM_COUNTED, VMEM_LIMIT = 12 * 2**20, 48 * 2**20


class Blocks(NamedTuple):
    """How the grid cuts the work.

    Attributes:
      queries: of a block.
      columns: their vectors, filled up to whole registers.
      step: candidates of one.
      tile: candidates whose scores are written together.
      vmem_bytes: of all blocks and intermediate results, without what the compiler adds.
    """

    queries: int
    columns: int
    step: int
    tile: int
    vmem_bytes: int


def choose_blocks(query_QRD: Array | jax.ShapeDtypeStruct, candidate_NRD: Array | jax.ShapeDtypeStruct) -> Blocks | None:
    """The blocks for inputs of `score`, or None where even the smallest are too large."""
    query_QRD, candidate_NRD = jax.eval_shape(_whole_registers, query_QRD, candidate_NRD)
    (Q, Rq, D), (N, Rc, _) = query_QRD.shape, candidate_NRD.shape
    query_bytes, candidate_bytes = (D * x.dtype.itemsize for x in (query_QRD, candidate_NRD))  # of a vector
    most = BLOCK_BYTES[query_QRD.dtype]
    most_queries = max(min(COLUMNS, most // query_bytes) // Rq // SUBLANES * SUBLANES, SUBLANES)
    queries = _up(pl.cdiv(Q, pl.cdiv(Q, most_queries)), SUBLANES)
    columns = _up(Rq * queries, LANES)
    fitting = min(most // candidate_bytes, most // (4 * columns)) // Rc
    step = max(_power_of_two(min(fitting, N)), SUBLANES)  # so that it divides a tile, or is one
    while True:
        tile = max(step, LANES)
        rest = columns * (step * Rc + tile) + tile * (_up(Rc, LANES) + 2 * _up(Rc, SUBLANES) + 2 * queries)  # float32 numbers
        vmem_bytes = columns * query_bytes + 2 * step * Rc * candidate_bytes + 4 * rest
        if vmem_bytes <= VMEM_COUNTED:
            return Blocks(queries, columns, step, tile, vmem_bytes)
        if step == SUBLANES:
            return None
        step //= 2


def score(
    query_QRD: Float[Array, "Q Rq D"],
    candidate_NRD: Float[Array, "N Rc D"] | Int[Array, "N Rc D"],
    mask_NR: Bool[Array, "N Rc"] | None = None,
    scale_NR: Float[Array, "N Rc"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "Q N"]:
    """Scores of every query against every candidate; products and sums are float32.

    What is neither float32, bfloat16 nor (candidates only) int8, or not a multiple of 128 wide, is first copied to be so.

    Args:
      query_QRD, candidate_NRD: such that `choose_blocks` has blocks for them; no axis is empty.
      mask_NR: False wins no maximum. A candidate of nothing else scores -inf.
      scale_NR: not negative: a candidate's vector is what is given times its scale. It multiplies the similarities instead.
      interpret: run by Pallas' interpreter, on any device.
    """
    blocks = choose_blocks(query_QRD, candidate_NRD)
    products = query_QRD.size * candidate_NRD.shape[0] * candidate_NRD.shape[1]
    query_QRD, candidate_NRD = _whole_registers(query_QRD, candidate_NRD)
    (Q, Rq, D), (N, Rc, _) = query_QRD.shape, candidate_NRD.shape
    parts, tiles, steps = pl.cdiv(Q, blocks.queries), pl.cdiv(N, blocks.tile), blocks.tile // blocks.step
    last = pl.cdiv(N, blocks.step) - 1
    by_candidate = _lies_by_candidate(Rc, candidate_NRD.dtype.itemsize)

    def candidates_of(part, tile, step):
        here = jnp.minimum(tile * steps + step, last)  # what the last tile reads again has no place in the scores
        return (here, 0, 0) if by_candidate else (0, here, 0)

    inputs = [_columns(query_QRD, blocks), candidate_NRD if by_candidate else jnp.swapaxes(candidate_NRD, 0, 1)]
    specs = [
        # The next queries come after all candidates: a second buffer for them would wait all the time.
        pl.BlockSpec((None, D, blocks.columns), lambda part, tile, step: (part, 0, 0), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((blocks.step, Rc, D) if by_candidate else (Rc, blocks.step, D), candidates_of),
    ]
    scratch = [(blocks.columns // LANES, blocks.step * Rc, LANES), (blocks.tile, blocks.columns)]
    if mask_NR is not None or scale_NR is not None:
        inputs.append(_factors((N, Rc), mask_NR, scale_NR).T)  # candidates along registers: 128 rows of few would be mostly padding
        specs.append(pl.BlockSpec((Rc, blocks.tile), lambda part, tile, step: (0, tile)))
        scratch.append((blocks.tile, Rc))
    return pl.pallas_call(
        partial(_kernel, blocks=blocks, query_vectors=Rq, by_candidate=by_candidate),
        grid=(parts, tiles, steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.queries, blocks.tile), lambda part, tile, step: (part, tile)),
        out_shape=jax.ShapeDtypeStruct((Q, N), jnp.float32),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(products, query_QRD, candidate_NRD, blocks),
        interpret=interpret,
        name="maxsim",
    )(*inputs)


def _kernel(query_ref, candidate_ref, *refs, blocks, query_vectors, by_candidate):
    factor_ref, score_ref, similarity_ref, best_ref, column_ref = refs if len(refs) == 5 else (None, *refs, None)
    step, n = pl.program_id(2), blocks.step
    if factor_ref is not None:

        @pl.when(step == 0)
        def _():
            column_ref[...] = factor_ref[...].T

    _write_similarities(query_ref, candidate_ref, similarity_ref)
    here = pl.ds(pl.multiple_of(step * n, n), n)
    candidate_vectors = candidate_ref.shape[1 if by_candidate else 0]

    @pl.loop(0, similarity_ref.shape[0], unroll=True)  # unlike a loop of Python it is traced once, which takes time on any device
    def _(group):
        def larger(j, best):
            rows = pl.ds(j, n, stride=candidate_vectors) if by_candidate else pl.ds(j * n, n)
            similarity = similarity_ref.at[group][rows, :]
            if factor_ref is not None:
                factor = column_ref[here, pl.ds(j, 1)]
                similarity = jnp.where(factor < 0, -jnp.inf, similarity * factor)
            return jnp.maximum(best, similarity)

        best = jax.lax.fori_loop(0, candidate_vectors, larger, jnp.full((n, LANES), -jnp.inf), unroll=True)
        best_ref[here, pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = best

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        columns = best_ref[...].T
        score_ref[...] = sum(columns[i * blocks.queries : (i + 1) * blocks.queries] for i in range(query_vectors))


def _write_similarities(query_ref, candidate_ref, similarity_ref):
    """All, in groups of columns that are a register wide: only from such can every R-th row be read."""
    first, second, width = candidate_ref.shape
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None  # else float32 is rounded to bfloat16
    # The more rows the better: a product loads the query's columns again for every chunk. But converted, or in parts for float32, a
    # whole block would take more room than there is.
    as_it_is = candidate_ref.dtype == query_ref.dtype == jnp.bfloat16
    chunk = max(PRODUCT_NUMBERS * (2 if as_it_is else 1) // (second * width), 1)
    for start in range(0, first, chunk):
        candidate = candidate_ref[start : start + chunk].astype(query_ref.dtype).reshape(-1, width)
        similarity = jnp.dot(candidate, query_ref[...], precision=precision, preferred_element_type=jnp.float32)
        rows = slice(start * second, start * second + candidate.shape[0])
        for group in range(similarity_ref.shape[0]):
            similarity_ref[group, rows] = similarity[:, group * LANES : (group + 1) * LANES]


def _cost(products: int, query_QRD: Array, candidate_NRD: Array, blocks: Blocks) -> pl.CostEstimate:
    """What the compiler and the planner cannot see in a kernel. Factors are left out: they are a small part of candidates."""
    queries, _, width = query_QRD.shape
    parts, columns_bytes = pl.cdiv(queries, blocks.queries), width * blocks.columns * query_QRD.dtype.itemsize
    moved = parts * (columns_bytes + candidate_NRD.size * candidate_NRD.dtype.itemsize) + 4 * queries * candidate_NRD.shape[0]
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)


def _columns(query_QRD: Array, blocks: Blocks) -> Float[Array, "blocks D M"]:
    """The first vectors of q queries, then their second, and so on: a sum over i is then one of aligned slabs."""
    queries, vectors, width = query_QRD.shape
    query_QRD = jnp.pad(query_QRD, [(0, -queries % blocks.queries), (0, 0), (0, 0)])
    columns = query_QRD.reshape(-1, blocks.queries, vectors, width).transpose(0, 3, 2, 1)
    columns = columns.reshape(-1, width, vectors * blocks.queries)
    return jnp.pad(columns, [(0, 0), (0, 0), (0, blocks.columns - columns.shape[2])])


def _factors(shape: tuple[int, int], mask_NR: Array | None, scale_NR: Array | None) -> Float[Array, "N R"]:
    """What similarities are multiplied with; -1 for a vector that is none."""
    factor_NR = jnp.ones(shape, jnp.float32) if scale_NR is None else scale_NR.astype(jnp.float32)
    return factor_NR if mask_NR is None else jnp.where(mask_NR, factor_NR, -1)


def _whole_registers(query_QRD: Array, candidate_NRD: Array) -> tuple[Array, Array]:
    """Both in types that the kernel takes, and filled up with zeros to whole registers."""
    if candidate_NRD.dtype not in (jnp.int8, jnp.bfloat16):
        candidate_NRD = candidate_NRD.astype(jnp.float32)
    narrow = query_QRD.dtype == jnp.bfloat16 and candidate_NRD.dtype != jnp.float32
    query_QRD = query_QRD.astype(jnp.bfloat16 if narrow else jnp.float32)
    filling = [(0, 0), (0, 0), (0, -query_QRD.shape[2] % LANES)]
    return jnp.pad(query_QRD, filling), jnp.pad(candidate_NRD, filling)


def _lies_by_candidate(vectors: int, itemsize: int) -> bool:
    """Whether XLA lays [N, R, D] out in this order; else it is [R, N, D], of which less is padding. Either is read as it lies."""
    return vectors % SUBLANES == 0 or (vectors in (1, 2, 4) and vectors * itemsize >= 4)


def _power_of_two(size: int) -> int:
    """The largest that is no larger than a size, or 0."""
    return 1 << (size.bit_length() - 1) if size else 0


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
