"""Scores of levels, and the best of blocks, against their definition in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.late_interaction.levels import Block, merge_block, no_best, score_levels
from metaembed_jax.sharding import make_mesh

EDGES = (0, 1, 4, 6)


def block(rng, candidates, *, ragged=False, int8=False):
    """A block with a candidate that is not there, and its vectors as lists in float64."""
    vectors = rng.normal(size=(candidates, EDGES[-1], 8)).astype(np.float32)
    scales = np.ones((candidates, EDGES[-1]), np.float32)
    if int8:
        vectors, scales = rng.integers(-127, 128, vectors.shape).astype(np.int8), rng.random(scales.shape, np.float32)
    counts = rng.integers(1, EDGES[-1] + 1, candidates).astype(np.int32) if ragged else np.full(candidates, EDGES[-1], np.int32)
    positions = np.arange(candidates, dtype=np.int32)
    positions[2] = -1
    parts = [slice(*pair) for pair in itertools.pairwise(EDGES)]
    made = Block(
        positions,
        counts if ragged else None,
        tuple(vectors[:, part] for part in parts),
        tuple(scales[:, part] for part in parts) if int8 else (),
    )
    exact = vectors.astype(float) * scales[..., None]
    return made, [one[:count] for one, count in zip(exact, counts, strict=True)]


def wanted(query, items):
    scores = np.array([[(one.astype(float) @ item.T).max(1).sum() for item in items] for one in query])
    scores[:, 2] = -np.inf
    return scores


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_scores(ragged, int8):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 2, 8)).astype(np.float32)
    made, items = block(rng, 5, ragged=ragged, int8=int8)
    scores = jax.jit(score_levels)(query, made)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, wanted(query, items), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_scored_in_float32():
    rng = np.random.default_rng(1)
    query = rng.normal(size=(3, 2, 8)).astype(np.float32)
    made, _ = block(rng, 5)
    half = made._replace(levels=tuple(jnp.asarray(level, jnp.bfloat16) for level in made.levels))
    widened = made._replace(levels=tuple(np.asarray(level, np.float32) for level in half.levels))
    np.testing.assert_array_equal(jax.jit(score_levels)(query, half), jax.jit(score_levels)(query, widened))


@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_best_of_blocks(k):
    """More are kept than there are; a later block holds a copy of an earlier candidate, which ties with it."""
    rng = np.random.default_rng(2)
    query = rng.integers(-2, 3, (4, 2, 8)).astype(np.float32)
    mesh, best, scores = make_mesh(2, 2, 2), no_best(4, k), []
    first, items = block(rng, 32, ragged=True)
    for number in range(2):
        made = first._replace(positions=np.where(first.positions < 0, -1, first.positions + 32 * number))
        best = merge_block(query, made, best, 4, mesh)
        scores.append(wanted(query, items))
    scores = np.concatenate(scores, axis=1)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    there = np.take_along_axis(scores, rows, axis=1) > -np.inf
    assert (np.asarray(best.positions) == np.where(there, rows, -1)).all()
    np.testing.assert_allclose(best.scores, np.take_along_axis(scores, rows, axis=1), rtol=1e-5, atol=1e-4)
