"""Exact search of tiles that are sharded over a mesh. All stages are one program.

The first stage scores every document: each device keeps its best, and the results are merged. Later stages score the survivors
where they are stored. A step of either multiplies arrays of a size that depends neither on the number of devices nor on where the
tiles come from. So results are the same bits on any mesh, and for tiles that are read from files during the search. On a TPU both
stages are kernels that read the tiles in place.

Q queries, R vectors of a query, T tiles, n documents of a tile, N documents, D width of a vector (of queries, that of the budget),
K survivors, k results; q, t, c those of a step.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from metaembed_jax.late_interaction import maxsim_tpu, survivors_tpu
from metaembed_jax.late_interaction.prefixes import unit_prefix
from metaembed_jax.late_interaction.sizes import floor_power
from metaembed_jax.late_interaction.stages import Stages
from metaembed_jax.late_interaction.tiles import Tiles
from metaembed_jax.precision import float32_einsum

QUERY_VECTORS, DOCUMENT_VECTORS = 256, 8192  # of a step on a CPU, where similarities stay in its cache
GPU_VECTORS = 65_536  # of documents, of a step of any stage on a GPU, where each step is a launch; not timed on a card yet
DOCUMENTS_FIRST = range(8, 33)  # numbers of query vectors with which a CPU multiplies documents by queries faster
MERGED_DOCUMENTS = 16_384  # scored before the best of them are merged
SURVIVOR_VECTORS = 2048  # of a step of a later stage on a CPU
LAST = jnp.iinfo(jnp.int32).max


class TopK(NamedTuple):
    """The best documents of each query, best first; of ties, the first position.

    Attributes:
      scores: float32 [Q, k]; -inf if there are fewer documents.
      positions: int32 [Q, k]; -1 if there are fewer documents.
    """

    scores: Float[Array, "Q k"]
    positions: Int[Array, "Q k"]


def empty_top_k(queries: int, k: int) -> TopK:
    """Return a top k without documents, to start a merge from."""
    return TopK(jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), -1, jnp.int32))


@partial(jax.jit, static_argnames=("stages", "k", "mesh"))
def search(queries: tuple[Float[Array, "Q _ _"], ...], segments: tuple[Tiles, ...], stages: Stages, k: int, mesh: Mesh) -> TopK:
    """Return the k best documents of each query.

    Args:
      queries: for each stage, from `stage_queries`; float32, replicated; Q is a power of two.
      segments: tiles that are sharded over all devices of the mesh, in order, with ascending positions.
      stages: from `as_stages`.
    """

    def on_device(queries, segments):
        top = empty_top_k(len(queries[0]), 0)
        for number, (query_QRD, (budget, survivors)) in enumerate(zip(queries, stages, strict=True)):
            vectors, count = budget.document, survivors or k
            if number == 0:
                top = empty_top_k(len(query_QRD), count)
                for tiles in segments:
                    top = _merge_over(mesh, top, _scan(query_QRD, tiles, vectors, count, mesh))
            else:
                positions_QK = in_order(top.positions)
                scores = [_score_survivors(query_QRD, tiles, vectors, positions_QK, mesh) for tiles in segments]
                top = best_of(_largest(scores, mesh), positions_QK, count)
        return top

    return _over(mesh, on_device)(queries, segments)


def stage_queries(query_QRD: Float[np.ndarray, "Q R D"], stages: Stages) -> list[Float[np.ndarray, "Q r w"]]:
    """Return the query vectors of each stage, cut by the host: in a program of one stage or of several, they are the same bits."""
    return [unit_prefix(query_QRD[:, : budget.query], budget.width) for budget, _ in stages]


@partial(jax.jit, static_argnames=("vectors", "mesh"))
def merge_tiles(query_QRD: Float[Array, "Q R D"], tiles: Tiles, top: TopK, vectors: int, mesh: Mesh) -> TopK:
    """Score the next tiles by their first `vectors` vectors, and merge their best documents into the top k so far.

    Args:
      query_QRD: of `stage_queries`.
    """

    def on_device(query_QRD, segments, top):
        (tiles,) = segments
        return _merge_over(mesh, top, _scan(query_QRD, tiles, vectors, top.scores.shape[1], mesh))

    return _over(mesh, on_device)(query_QRD, (tiles,), top)


@partial(jax.jit, static_argnames=("vectors", "mesh"))
def score_survivors(
    query_QRD: Float[Array, "Q R D"], tiles: Tiles, positions_QK: Int[Array, "Q K"], vectors: int, mesh: Mesh
) -> Float[Array, "Q K"]:
    """Return the scores of each query's documents at ascending positions; -inf for positions outside of the tiles, and for -1."""

    def on_device(query_QRD, segments, positions_QK):
        return _largest([_score_survivors(query_QRD, tiles, vectors, positions_QK, mesh) for tiles in segments], mesh)

    return _over(mesh, on_device)(query_QRD, (tiles,), positions_QK)


@jax.jit
def in_order(positions_QK: Int[Array, "Q K"]) -> Int[Array, "Q K"]:
    """Sort the positions of each query, so that the first position wins ties in the next stage too; -1 comes last."""
    ordered_QK = jnp.sort(jnp.where(positions_QK < 0, LAST, positions_QK), axis=1)
    return jnp.where(ordered_QK == LAST, -1, ordered_QK)


@partial(jax.jit, static_argnames="k")
def best_of(scores_QN: Float[Array, "Q N"], positions_QN: Int[Array, "Q N"], k: int) -> TopK:
    """Return the k best of some documents; of ties, the first in order. Those that score -inf are left out."""
    scores, columns = jax.lax.top_k(scores_QN, min(k, scores_QN.shape[1]))
    positions = jnp.take_along_axis(positions_QN, columns, axis=1)
    top = TopK(scores, jnp.where(scores == -jnp.inf, -1, positions))
    missing = k - scores.shape[1]
    return TopK(*(jnp.pad(x, ((0, 0), (0, missing)), constant_values=value) for x, value in zip(top, (-jnp.inf, -1), strict=True)))


def score_tiles(query_QRD: Float[Array, "Q R D"], tiles: Tiles, has_documents_first: bool) -> Float[Array, "Q N"]:
    """Return MaxSim of every query and every document, float32, by all vectors of the tiles.

    Args:
      has_documents_first: multiply documents by queries, not queries by documents.
    """
    queries, vectors, width = query_QRD.shape
    query_XD, document_YD = query_QRD.reshape(-1, width), tiles.vectors.reshape(-1, width)
    t, r_c, n, _ = tiles.vectors.shape
    if has_documents_first:
        similarity = float32_einsum("yd,xd->yx", document_YD, query_XD).reshape(t, r_c, n, -1)
        similarity = _masked(similarity, tiles, (..., None))
        return similarity.max(1).reshape(-1, queries, vectors).sum(2).T
    similarity = float32_einsum("xd,yd->xy", query_XD, document_YD).reshape(-1, t, r_c, n)
    return _masked(similarity, tiles, (None, ...)).max(2).reshape(queries, vectors, -1).sum(1)


def _masked(similarity: Array, tiles: Tiles, axes: tuple) -> Array:
    """Apply the scales to similarities, and hide those of padding; `axes` makes room for the query vectors."""
    if tiles.scales is not None:
        similarity *= tiles.scales[axes]
    if tiles.counts is None:
        return similarity
    is_vector = jnp.arange(tiles.vectors.shape[1])[:, None] < tiles.counts[:, None]
    return jnp.where(is_vector[axes], similarity, -jnp.inf)


def step_tiles(mesh: Mesh, vectors: int, documents: int) -> int:
    """Return the tiles of a step: a power of two, whatever the number of tiles, so that the products have the same shape.

    Args:
      vectors: vectors that are scored of a document.
      documents: documents of a tile.
    """
    return _at_once(mesh, DOCUMENT_VECTORS, vectors * documents)


def _at_once(mesh: Mesh, on_cpu: int, vectors: int) -> int:
    """Return how many blocks of `vectors` document vectors make a step: a power of two."""
    most = on_cpu if mesh.devices.flat[0].platform == "cpu" else GPU_VECTORS
    return floor_power(most // vectors)


def _over(mesh: Mesh, function: Callable) -> Callable:
    """Run a function on every device, with the segments sharded by tiles, its second argument, and all else replicated."""
    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)

    def on_mesh(queries, segments, *others):
        specs = tuple(jax.tree.map(lambda _: split, tiles)._replace(first=whole) for tiles in segments)
        in_specs = (whole, specs, *(jax.tree.map(lambda _: whole, other) for other in others))
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)  # kernels are not checked
        return mapped(queries, segments, *others)

    return on_mesh


def _scan(query_QRD: Array, tiles: Tiles, vectors: int, k: int, mesh: Mesh) -> TopK:
    """Return the best documents of this device."""
    offset, tiles = tiles.first + jax.lax.axis_index(mesh.axis_names) * tiles.documents, tiles.at_width(query_QRD.shape[2])
    if _is_tpu(mesh):
        scores_QN = maxsim_tpu.score(query_QRD, tiles.vectors, tiles.scales, _candidate_counts(tiles), vectors)
        return best_of(scores_QN, jnp.broadcast_to(offset + jnp.arange(scores_QN.shape[1]), scores_QN.shape), k)
    step = step_tiles(mesh, vectors, tiles.vectors.shape[2])
    steps = -(-tiles.vectors.shape[0] // step)
    merges = min(-(-steps * step * tiles.vectors.shape[2] // MERGED_DOCUMENTS), steps)
    merged = -(-steps // merges)

    def merge(top: TopK, number: Array) -> tuple[TopK, None]:
        scores_sQn = jax.lax.map(
            lambda number: _score_step(query_QRD, tiles, vectors, step, number), number * merged + jnp.arange(merged)
        )
        scores_QN = jnp.moveaxis(scores_sQn, 1, 0).reshape(len(query_QRD), -1)
        positions_N = offset + number * scores_QN.shape[1] + jnp.arange(scores_QN.shape[1])
        new = best_of(scores_QN, jnp.broadcast_to(positions_N, scores_QN.shape), k)
        return best_of(*(jnp.concatenate(pair, axis=1) for pair in zip(top, new, strict=True)), k), None

    return jax.lax.scan(merge, empty_top_k(len(query_QRD), k), jnp.arange(merges))[0]


def _is_tpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def _candidate_counts(tiles: Tiles) -> Int[Array, "T n"]:
    """Return the number of vectors of each document; 0 for those that are not candidates."""
    return jnp.where(tiles.is_candidate, tiles.vectors.shape[1] if tiles.counts is None else tiles.counts, 0)


def _score_step(query_QRD: Array, tiles: Tiles, vectors: int, step: int, number: Array) -> Float[Array, "Q n"]:
    """Return the scores of the documents of a step of `step` tiles; -inf for padding and for those that are not candidates."""
    count = tiles.vectors.shape[0]
    start = jnp.clip(number * step, 0, max(count - step, 0))

    def of_step(x: Array, *whole: int) -> Array:
        x = jax.lax.dynamic_slice(x, (start, *(0 for _ in whole)), (min(step, count), *whole))
        return jnp.pad(x, [(0, step - x.shape[0]), *((0, 0) for _ in whole)])

    documents, width = tiles.vectors.shape[2], query_QRD.shape[2]
    sliced = Tiles(
        of_step(tiles.vectors, vectors, documents, width),
        None if tiles.scales is None else of_step(tiles.scales, vectors, documents),
        None if tiles.counts is None else of_step(jnp.minimum(tiles.counts, vectors), documents),
        of_step(tiles.is_candidate, documents),
        tiles.first,
    )
    # The last step starts early enough to be full: the tiles that were scored before are rolled to its end, and hidden.
    shift = number * step - start
    scores_QN = jnp.where(sliced.is_candidate.reshape(-1), _by_queries(query_QRD, sliced), -jnp.inf)
    scores_QtN = jnp.roll(scores_QN.reshape(len(query_QRD), step, documents), -shift, axis=1)
    is_new_t = jnp.arange(step) + number * step < count
    return jnp.where(is_new_t[:, None], scores_QtN, -jnp.inf).reshape(len(query_QRD), -1)


def _by_queries(query_QRD: Array, tiles: Tiles) -> Float[Array, "Q N"]:
    """Return the scores of `score_tiles`, in steps of about `QUERY_VECTORS` query vectors."""
    queries, vectors, _ = query_QRD.shape
    at_once = min(queries, floor_power(QUERY_VECTORS // vectors))
    has_documents_first = at_once * vectors in DOCUMENTS_FIRST
    if at_once == queries:
        return score_tiles(query_QRD, tiles, has_documents_first)
    steps = query_QRD.reshape(-1, at_once, *query_QRD.shape[1:])
    return jax.lax.map(lambda query_qRD: score_tiles(query_qRD, tiles, has_documents_first), steps).reshape(queries, -1)


def _merge_over(mesh: Mesh, top: TopK, new: TopK) -> TopK:
    """Merge the best documents of all devices, whose positions follow those of `top`, into it."""
    if mesh.size > 1:
        new = TopK(*(jax.lax.all_gather(x, mesh.axis_names, axis=1, tiled=True) for x in new))
    return best_of(*(jnp.concatenate(pair, axis=1) for pair in zip(top, new, strict=True)), top.scores.shape[1])


def _largest(scores: list[Float[Array, "Q K"]], mesh: Mesh) -> Float[Array, "Q K"]:
    """Return the scores of survivors from the segment and the device that has each."""
    largest_QK = scores[0]
    for scores_QK in scores[1:]:
        largest_QK = jnp.maximum(largest_QK, scores_QK)
    return jax.lax.pmax(largest_QK, mesh.axis_names) if mesh.size > 1 else largest_QK


def _score_survivors(query_QRD: Array, tiles: Tiles, vectors: int, positions_QK: Array, mesh: Mesh) -> Float[Array, "Q K"]:
    """Return the scores of the survivors that are stored on this device; -inf for all others, which take no time."""
    tiles = tiles.at_width(query_QRD.shape[2])
    rows_QK = positions_QK - tiles.first - jax.lax.axis_index(mesh.axis_names) * tiles.documents
    is_here_QK = (positions_QK >= 0) & (rows_QK >= 0) & (rows_QK < tiles.documents)
    # The padding of a segment has the positions of the next.
    is_here_QK &= tiles.is_candidate.reshape(-1)[jnp.where(is_here_QK, rows_QK, 0)]
    if _is_tpu(mesh):
        expected = positions_QK.shape[1] / mesh.size  # of a query, on each device
        slots_QK = jnp.where(is_here_QK, rows_QK, -1)
        counts_Tn = _candidate_counts(tiles)
        return survivors_tpu.score_survivors(
            query_QRD, tiles.vectors, tiles.scales, counts_Tn, slots_QK, vectors, expected=expected
        )
    step = _at_once(mesh, SURVIVOR_VECTORS, vectors)
    padding = -rows_QK.shape[1] % step

    def score_query(arguments: tuple[Array, Array, Array]) -> Float[Array, " K"]:
        query_RD, rows_K, is_here_K = arguments
        # Positions ascend, so the rows of this device are consecutive.
        first, count = jnp.argmax(is_here_K), is_here_K.sum()
        rows_K = jnp.roll(jnp.where(is_here_K, rows_K, 0), -first)
        rows_K = jnp.pad(rows_K, (0, padding))

        def score(number: Array, scores_K: Array) -> Array:
            rows_c = jax.lax.dynamic_slice_in_dim(rows_K, number * step, step)
            return jax.lax.dynamic_update_slice_in_dim(scores_K, _score_rows(query_RD, tiles, vectors, rows_c), number * step, 0)

        scores_K = jnp.full(rows_K.shape, -jnp.inf, jnp.float32)
        scores_K = jax.lax.fori_loop(0, -(-count // step), score, scores_K)
        return jnp.roll(scores_K[: len(is_here_K)], first)

    return jnp.where(is_here_QK, jax.lax.map(score_query, (query_QRD, rows_QK, is_here_QK)), -jnp.inf)


def _score_rows(query_RD: Array, tiles: Tiles, vectors: int, rows_c: Int[Array, " c"]) -> Float[Array, " c"]:
    """Return MaxSim of a query and some documents."""
    tile_c, slot_c = rows_c // tiles.vectors.shape[2], rows_c % tiles.vectors.shape[2]
    document_crD = tiles.vectors[tile_c, :vectors, slot_c, : query_RD.shape[1]]
    similarity_cri = float32_einsum("yd,id->yi", document_crD.reshape(-1, document_crD.shape[2]), query_RD)
    similarity_cri = similarity_cri.reshape(len(rows_c), vectors, -1)
    if tiles.scales is not None:
        similarity_cri *= tiles.scales[tile_c, :vectors, slot_c][..., None]
    if tiles.counts is not None:
        is_vector_cr = jnp.arange(vectors) < tiles.counts[tile_c, slot_c][:, None]
        similarity_cri = jnp.where(is_vector_cr[..., None], similarity_cri, -jnp.inf)
    return similarity_cri.max(1).sum(1)
