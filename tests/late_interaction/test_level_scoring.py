"""Scores of levels and the top k of blocks against their definition in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.late_interaction.level_scoring import Block, empty_top_k, merge_block, score_levels
from metaembed_jax.mesh import make_mesh

EDGES = (0, 1, 4, 6)


def random_block(rng, documents, *, ragged=False, int8=False):
    """Return a block with a deleted document, and the vectors of its documents in float64."""
    vectors = rng.normal(size=(documents, EDGES[-1], 8)).astype(np.float32)
    scales = np.ones((documents, EDGES[-1]), np.float32)
    if int8:
        vectors, scales = rng.integers(-127, 128, vectors.shape).astype(np.int8), rng.random(scales.shape, np.float32)
    counts = rng.integers(1, EDGES[-1] + 1, documents).astype(np.int32) if ragged else np.full(documents, EDGES[-1], np.int32)
    positions = np.arange(documents, dtype=np.int32)
    positions[2] = -1
    levels = [slice(*pair) for pair in itertools.pairwise(EDGES)]
    block = Block(
        positions,
        counts if ragged else None,
        tuple(vectors[:, level] for level in levels),
        tuple(scales[:, level] for level in levels) if int8 else (),
    )
    exact = vectors.astype(float) * scales[..., None]
    return block, [document[:count] for document, count in zip(exact, counts, strict=True)]


def expected_scores(queries, documents):
    scores = np.array([[(query.astype(float) @ document.T).max(1).sum() for document in documents] for query in queries])
    scores[:, 2] = -np.inf
    return scores


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_scores(ragged, int8):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 2, 8)).astype(np.float32)
    block, documents = random_block(rng, 5, ragged=ragged, int8=int8)
    scores = jax.jit(score_levels)(query, block)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected_scores(query, documents), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_scored_in_float32():
    rng = np.random.default_rng(1)
    query = rng.normal(size=(3, 2, 8)).astype(np.float32)
    block, _ = random_block(rng, 5)
    half = block._replace(levels=tuple(jnp.asarray(level, jnp.bfloat16) for level in block.levels))
    widened = block._replace(levels=tuple(np.asarray(level, np.float32) for level in half.levels))
    np.testing.assert_array_equal(jax.jit(score_levels)(query, half), jax.jit(score_levels)(query, widened))


@pytest.mark.parametrize("k", [1, 8, 64])
def test_top_k_of_blocks(k):
    """Also k above the number of documents; the second block repeats the documents of the first, so they tie."""
    rng = np.random.default_rng(2)
    query = rng.integers(-2, 3, (4, 2, 8)).astype(np.float32)
    mesh, top, scores = make_mesh(2, 2, 2), empty_top_k(4, k), []
    first, documents = random_block(rng, 32, ragged=True)
    for number in range(2):
        block = first._replace(positions=np.where(first.positions < 0, -1, first.positions + 32 * number))
        top = merge_block(query, block, top, 4, mesh)
        scores.append(expected_scores(query, documents))
    scores = np.concatenate(scores, axis=1)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    is_filled = np.take_along_axis(scores, rows, axis=1) > -np.inf
    assert (np.asarray(top.positions) == np.where(is_filled, rows, -1)).all()
    np.testing.assert_allclose(top.scores, np.take_along_axis(scores, rows, axis=1), rtol=1e-5, atol=1e-4)
