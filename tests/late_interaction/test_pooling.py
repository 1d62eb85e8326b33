"""Pooling against sentence-transformers, which clusters the same distances."""

import numpy as np
import pytest

from metaembed_jax.late_interaction.pooling import Pools, count_vectors, pooling_flops


def items(*counts, most=40, width=6):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(counts), most, width)).astype(np.float32) + 1
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[np.arange(most) >= np.array(counts)[:, None]] = 0
    return vectors


def test_zeros_are_padding():
    vectors = items(1, 3, 40)
    vectors[2, 5] = 0  # not after the last
    assert count_vectors(vectors).tolist() == [1, 3, 40]


@pytest.mark.parametrize("most", [1, 4, 16])
def test_equals_sentence_transformers(most):
    pooling = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules").HierarchicalTokenPooling
    torch = pytest.importorskip("torch")
    counts, vectors = (40, 37, 16, 3, 1), items(40, 37, 16, 3, 1)
    pooled = Pools(vectors).pool(most)
    assert pooled.shape == (5, most, 6)
    for count, ours, all_vectors in zip(counts, pooled, vectors, strict=True):
        kept = min(count, most)
        theirs = pooling(pool_factor=count / kept, num_protected_tokens=0).pool_one(torch.tensor(all_vectors[:count])).numpy()
        assert len(theirs) == kept
        np.testing.assert_allclose(ours[:kept], theirs, atol=1e-6)
        assert not ours[kept:].any()


def test_fewer_clusters_than_asked_for():
    vectors = np.repeat(items(2, most=2), 5, axis=1)  # two different vectors, five times each
    pooled = Pools(vectors).pool(4)
    assert count_vectors(pooled).tolist() == [2]
    assert {tuple(row) for row in np.round(pooled[0, :2], 5)} == {tuple(row) for row in np.round(vectors[0, ::5], 5)}


def test_flops():
    assert pooling_flops(3, 10) == 2 * 3 * 10 + 3 * 10  # three pairs of vectors, and their sum
