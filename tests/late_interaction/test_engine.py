"""Searches of tiles against their definition in float64, on one device and on eight."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from metaembed_jax.late_interaction import engine, maxsim_tpu, survivors_tpu
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import as_stages
from metaembed_jax.late_interaction.tiles import Tiles, count_tiles, write_rows
from metaembed_jax.mesh import make_mesh
from tests.retrieval.reference import cut, exact, unit

SIZE, VECTORS, WIDTH = 4, 5, 16  # of the tiles here
LARGEST = Budget(3, VECTORS, WIDTH)
MESHES = make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2, 2)


def as_tiles(vectors_NRD, scales_NR, counts_N, is_candidate_N, first, mesh, size=SIZE, widths=()) -> Tiles:
    """Return documents as tiles of `size` documents, sharded over a mesh, with a tile of padding for each device.

    Args:
      widths: of `Tiles.prefixes`.
    """
    documents = len(vectors_NRD)
    tiles = (-(-documents // (size * mesh.size)) + 1) * mesh.size
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def put(array_NRx):
        if array_NRx is None:
            return None
        result = np.zeros((tiles, array_NRx.shape[1], size, *array_NRx.shape[2:]), array_NRx.dtype)
        write_rows(result, array_NRx)
        return jax.device_put(result, split)

    def put_rows(array_N):
        return None if array_N is None else jax.device_put(put(array_N[:, None])[:, 0], split)

    stored_NRD = vectors_NRD.astype(np.float32)
    scale_NR = 1 if scales_NR is None else scales_NR
    prefixes = {
        width: put((scale_NR / np.sqrt((stored_NRD[..., :width] ** 2).sum(2) * scale_NR**2 + 1e-24)).astype(np.float32))
        for width in widths
    }
    return Tiles(put(vectors_NRD), put(scales_NR), put_rows(counts_N), put_rows(is_candidate_N), jnp.int32(first), prefixes)


def queries_of(query, stages):
    return tuple(engine.stage_queries(query, stages))


def definition(queries, items, candidates, stages, k):
    """Return scores [Q, k] and positions [Q, k] by sorted lists; -inf and -1 where there are fewer documents."""
    scores_Qk, positions_Qk = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    for q, query in enumerate(queries):
        remaining = candidates
        for (r_q, r_c, width), survivors in stages:
            scores = {n: (cut(query[:r_q], width) @ cut(items[n][:r_c], width).T).max(1).sum() for n in remaining}
            ranked = sorted(remaining, key=lambda n: (-scores[n], n))[: survivors or k]
            remaining = sorted(ranked)
        scores_Qk[q, : len(ranked)], positions_Qk[q, : len(ranked)] = [scores[n] for n in ranked], ranked
    return scores_Qk, positions_Qk


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([(1,), (37,), (20, 7), (3, 1, 30)]),
    queries=st.sampled_from([1, 4, 16]),
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    ties=st.booleans(),
    ragged=st.booleans(),
    stages=st.sampled_from(
        [
            ((3, 5),),
            ((1, 2),),
            ((1, 1, 9), (3, 5)),
            ((2, 2, 30), (1, 3, 8), (3, 4)),
            ((3, 5, 4),),
            ((1, 1, 4, 9), (2, 5, 8), (3, 5, 4)),
        ]
    ),
    k=st.sampled_from([1, 4, 8]),
    mesh=st.sampled_from(MESHES),
)
def test_equal_to_the_definition(seed, sizes, queries, kind, ties, ragged, stages, k, mesh):
    rng, documents = np.random.default_rng(seed), sum(sizes)
    query = (exact if ties else unit)(rng, queries, 3, WIDTH)
    vectors = (exact if ties else unit)(rng, documents, VECTORS, WIDTH)
    scales = None
    if kind == "int8":
        vectors = np.round(vectors * 100).astype(np.int8)
        scales = rng.choice([0.25, 0.5], (documents, VECTORS)).astype(np.float32)
    elif kind == "bfloat16":
        vectors = vectors.astype(ml_dtypes.bfloat16)
    counts = rng.integers(1, VECTORS + 1, documents).astype(np.int32) if ragged else None
    is_candidate = rng.random(documents) < 0.8
    stored = vectors.astype(float) * (1 if scales is None else scales[..., None])
    items = [stored[n][: VECTORS if counts is None else counts[n]] for n in range(documents)]
    segments, first = [], 0
    for size in sizes:
        parts = (None if x is None else x[first : first + size] for x in (vectors, scales, counts, is_candidate))
        segments.append(as_tiles(*parts, first, mesh, widths=(4,)))
        first += size
    stages = as_stages(stages, LARGEST)
    top = engine.search(queries_of(query, stages), tuple(segments), stages, k, mesh)
    scores, positions = definition(query, items, np.flatnonzero(is_candidate).tolist(), stages, k)
    np.testing.assert_array_equal(top.positions, positions)
    np.testing.assert_allclose(top.scores, scores, rtol=2e-6 * (100 if kind == "int8" else 1), atol=2e-6)


def test_steps_that_do_not_divide_the_tiles(monkeypatch):
    """11 tiles in steps of 4, merged after 2 steps, and 5 queries at a time; the scores are those of one step, to the bit."""
    rng = np.random.default_rng(0)
    query, vectors = unit(rng, 8, 3, WIDTH), unit(rng, 11 * SIZE - 2, VECTORS, WIDTH)
    mesh = MESHES[0]
    tiles = as_tiles(vectors, None, None, np.ones(len(vectors), bool), 0, mesh)
    stages = as_stages((3, 5), LARGEST)
    whole = engine.search((query,), (tiles,), stages, 40, mesh)
    for name, value in {"DOCUMENT_VECTORS": 4 * SIZE * VECTORS, "MERGED_DOCUMENTS": 8 * SIZE, "QUERY_VECTORS": 6}.items():
        monkeypatch.setattr(engine, name, value)
    jax.clear_caches()
    parts = engine.search((query,), (tiles,), stages, 40, mesh)
    np.testing.assert_array_equal(parts.positions, whole.positions)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-6)
    jax.clear_caches()


@pytest.mark.parametrize(("width", "first", "last"), [(128, 0, 0), (256, 100, 0), (256, 0, 5), (80, 33, 0)])
def test_kernels_return_what_xla_does(monkeypatch, width, first, last):
    """The search of a TPU, with its kernels in Pallas' interpreter; budgets with a width read whole registers."""
    rng, mesh = np.random.default_rng(3), MESHES[1]
    query, vectors = unit(rng, 2, 2, width), np.round(unit(rng, 150, 3, width) * 300).astype(np.int8)
    scales, counts = rng.random((150, 3), np.float32), rng.integers(1, 4, 150).astype(np.int32)
    widths = {first, last} - {0}
    segments = (as_tiles(vectors, scales, counts, rng.random(150) < 0.8, 0, mesh, 128, widths),)
    options = as_stages(((1, 1, first, 40), (2, 3, last)), Budget(2, 3, width)), 10, mesh
    query = queries_of(query, options[0])
    expected = engine.search(query, segments, *options)
    for module, function in ((maxsim_tpu, "score"), (survivors_tpu, "score_survivors")):
        monkeypatch.setattr(module, function, partial(getattr(module, function), interpret=True))
    monkeypatch.setattr(engine, "_is_tpu", lambda mesh: True)
    top = jax.jit(lambda query, segments: engine.search.__wrapped__(query, segments, *options))(query, segments)
    np.testing.assert_array_equal(top.positions, expected.positions)
    np.testing.assert_allclose(top.scores, expected.scores, rtol=1e-6, atol=1e-6 * np.abs(expected.scores).max())


@pytest.mark.parametrize("mesh", MESHES, ids=["one", "eight"])
def test_survivors_outside_of_the_tiles(mesh):
    rng = np.random.default_rng(1)
    query, vectors = unit(rng, 2, 3, WIDTH), unit(rng, 50, VECTORS, WIDTH)
    tiles = as_tiles(vectors, None, None, np.ones(50, bool), 100, mesh)
    positions = np.array([[7, 100, 120, 149, 150], [101, 102, -1, -1, -1]], np.int32)
    scores = engine.score_survivors(query, tiles, positions, 4, mesh)
    is_here = (positions >= 100) & (positions < 150)
    expected = (
        (query[:, None].astype(float) @ vectors[np.where(is_here, positions - 100, 0)][:, :, :4].swapaxes(2, 3)).max(3).sum(2)
    )
    np.testing.assert_allclose(scores, np.where(is_here, expected, -np.inf), rtol=1e-6)


def test_order_of_positions_and_of_ties():
    positions = np.array([[5, -1, 2], [-1, -1, 0]], np.int32)
    np.testing.assert_array_equal(engine.in_order(positions), [[2, 5, -1], [0, -1, -1]])
    top = engine.best_of(np.array([[1, 2, 2, -np.inf]], np.float32), np.array([[3, 4, 9, 11]], np.int32), 5)
    np.testing.assert_array_equal(top.positions, [[4, 9, 3, -1, -1]])
    np.testing.assert_array_equal(top.scores, np.array([[2, 2, 1, -np.inf, -np.inf]], np.float32))


@pytest.mark.parametrize("documents", [0, 3, 4, 11])
def test_rows_are_written_vector_by_vector(documents):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(documents, 2, 3)).astype(ml_dtypes.bfloat16)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        tiles = np.zeros((3, 2, 4, 3), dtype)
        write_rows(tiles, rows)
        flat = tiles.swapaxes(1, 2).reshape(-1, 2, 3)
        np.testing.assert_array_equal(flat[:documents].astype(float), rows.astype(float))
        assert not flat[documents:].any()


def test_count_tiles():
    assert [count_tiles(n, 1) for n in (0, 1, 128, 129)] == [1, 1, 1, 2]
    assert [count_tiles(n, 8) for n in (1, 1024, 1025)] == [8, 8, 16]
