"""The loss over all token states against its definition in float64, and pooling against sentence-transformers."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from metaembed_jax.late_interaction.all_states import VectorCounts, all_states_loss
from metaembed_jax.late_interaction.right_documents import ItemDigests

TOLERANCE = 5e-5
MOST = 5, 7  # vectors of a query, of a document


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_batch(pairs, negatives, seed=0):
    """Return vectors and counts; padding is of other items, as in packed rows, and nearer than any vector."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=16)
    shapes = (pairs, MOST[0]), (pairs, MOST[1]), (pairs, negatives, MOST[1])
    vectors = [unit(directions + rng.normal(size=(*shape, 16))) for shape in shapes]
    counts = [rng.integers(1, shape[-1], shape[:-1], endpoint=True).astype(np.int32) for shape in shapes]
    for array, count in zip(vectors, counts, strict=True):
        array[np.arange(array.shape[-2]) >= count[..., None]] = unit(directions)
    return vectors, VectorCounts(*counts)


def reference(vectors, counts, temperature=0.02, negative_mask=None, sources=None, same=None):
    """Return the loss, its gradients and the accuracy, query by query.

    Args:
      same: {query: numbers of other rows that hold a right document of it}.
    """
    query, positive, negatives = (array.astype(np.float64) for array in vectors)
    gradients, loss, hits = [np.zeros_like(x) for x in (query, positive, negatives)], 0.0, 0
    for b, r_q in enumerate(counts.queries):
        documents = [(positive[n, :count], gradients[1][n]) for n, count in enumerate(counts.positives)]
        documents += [(negatives[b, k, :count], gradients[2][b, k]) for k, count in enumerate(counts.negatives[b])]
        of_source = np.ones(len(query), bool) if sources is None else sources == sources[b]
        of_source[list((same or {}).get(b, ()))] = False
        mask = np.ones(negatives.shape[1], bool) if negative_mask is None else negative_mask[b]
        ranked = np.concatenate([of_source, mask])
        similarities = [query[b, :r_q] @ document.T for document, _ in documents]
        scores = np.where(ranked, [s.max(1).mean() for s in similarities], -np.inf)
        weights = np.exp((scores - scores.max()) / temperature)
        weights /= weights.sum()
        loss -= np.log(weights[b])
        hits += (np.delete(scores, b) < scores[b]).all()
        weights[b] -= 1
        for weight, s, (document, gradient) in zip(weights, similarities, documents, strict=True):
            share, winners = weight / temperature / r_q / len(query), s.argmax(1)
            gradients[0][b, :r_q] += share * document[winners]
            np.add.at(gradient, winners, share * query[b, :r_q])
    return loss / len(query), gradients, hits / len(query)


def relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_matches(vectors, counts, same=None, digests=None, **options):
    facts = {key: options[key] for key in ("negative_mask", "sources") if key in options}
    expected, expected_gradients, accuracy = reference(vectors, counts, same=same, **facts)

    def loss(*vectors):
        return all_states_loss(*vectors, counts, digests=digests, **options)

    (value, figures), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*vectors)
    assert relative(value, expected) < TOLERANCE
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        assert relative(actual, gradient) < TOLERANCE
    assert figures["loss/5:7"] == value and figures["accuracy/5:7"] == pytest.approx(accuracy)
    return figures


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("chunk", [None, 5])
def test_equals_the_reference(negatives, chunk):
    figures = assert_matches(*make_batch(12, negatives), chunk=chunk)
    assert 0 < figures["accuracy/5:7"] < 1


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_query_does_not_rank_and_shards(sharded):
    vectors, counts = make_batch(16, 2)
    rng = np.random.default_rng(1)
    facts = {"negative_mask": rng.random((16, 2)) < 0.5, "sources": rng.integers(0, 2, 16)}
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")) if sharded else None
    masked = assert_matches(vectors, counts, mesh=mesh, **facts)
    assert masked["loss/5:7"] < assert_matches(vectors, counts, mesh=mesh)["loss/5:7"]
    queries = np.array([0, 0, *range(2, 16)])  # the first two queries are the same
    digests = ItemDigests(*(x[..., None].astype(np.int32) for x in (queries, np.arange(16), 100 + np.arange(32).reshape(16, 2))))
    assert assert_matches(vectors, counts, {0: [1], 1: [0]}, digests, mesh=mesh)["same/documents"] == 2
