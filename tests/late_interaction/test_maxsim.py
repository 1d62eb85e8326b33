import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed_jax.check.references import maxsim_scores
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction import maxsim as module
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.mesh import make_mesh
from tests.products import products, rounded, rounded_in_kernels


def vectors(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cut(x, width):
    """Return the prefixes of vectors of 7 numbers in float64, divided by their length; zeros stay zeros."""
    if width in (0, 7):
        return x.astype(float)
    prefix = x[..., :width].astype(float)
    return prefix / np.maximum(np.linalg.norm(prefix, axis=-1, keepdims=True), 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(0, 4),
    documents=st.integers(0, 9),
    query_vectors=st.integers(1, 3),
    document_vectors=st.integers(1, 5),
    width=st.sampled_from([0, 1, 4, 7]),
    kind=st.sampled_from(["noise", "ties", "ragged", "masked", "int8"]),
    seed=st.integers(0, 9),
)
def test_equals_the_definition(queries, documents, query_vectors, document_vectors, width, kind, seed):
    """No items, a single item, ties, any mask (with larger vectors as padding), int8 with scales (some of them zero)."""
    rng = np.random.default_rng(seed)
    query, document = vectors(rng, queries, query_vectors, 7), vectors(rng, documents, document_vectors, 7)
    if kind == "ties":  # sums of such numbers are exact, so equal scores are equal bits
        query, document = np.sign(query), np.sign(document)
    r_q, r_c = int(rng.integers(1, query_vectors + 1)), int(rng.integers(1, document_vectors + 1))
    mask = scale = None
    if kind == "ragged":
        mask = np.arange(document_vectors) < rng.integers(0, document_vectors + 1, (documents, 1))
    if kind == "masked":
        mask = rng.random((documents, document_vectors)) < 0.5
    if kind == "int8":
        document, scale = np.round(document * 127).astype(np.int8), rng.random((documents, document_vectors), np.float32) / 127
        scale[:, ::3] = 0
    exact = document.astype(float) if scale is None else document * scale[..., None].astype(float)
    if mask is not None:
        document[~mask] = 10
    expected = np.full((queries, documents), -np.inf)
    query_QRD, exact = cut(query, width), cut(exact, width)
    for n in range(documents):
        kept = exact[n, :r_c] if mask is None else exact[n, :r_c][mask[n, :r_c]]
        if len(kept):
            expected[:, n] = maxsim_scores(query_QRD[:, :r_q], kept[None])[:, 0]
    scores = maxsim(query, document, (r_q, r_c, width), mask, scale)
    assert scores.dtype == jnp.float32 and scores.shape == (queries, documents)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    if kind == "ties" and width in (0, 4, 7):
        np.testing.assert_array_equal(scores, expected)


def test_eight_devices_score_cut_vectors_to_the_bit():
    rng = np.random.default_rng(0)
    query, document = vectors(rng, 3, 2, 24), vectors(rng, 21, 5, 24)
    one, eight = (
        module.maxsim_on(mesh, query, document, (2, 4, 9)) for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2, 2))
    )
    prefixes = (x[..., :9].astype(float) for x in (query, document[:, :4]))
    expected = maxsim_scores(*(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in prefixes))
    np.testing.assert_allclose(one, expected, rtol=1e-6)
    np.testing.assert_array_equal(eight, one)


@pytest.mark.parametrize(("queries", "documents"), [(1, 1), (7, 10), (8, 12), (70, 210)])
def test_blocks_that_do_not_divide(queries, documents):
    rng = np.random.default_rng(0)
    query, document = vectors(rng, queries, 16, 8), vectors(rng, documents, 64, 8)
    assert documents < 210 or (documents % (module.DOCUMENT_VECTORS // 64) and queries % (module.QUERY_VECTORS // 16))
    expected = np.einsum("qid,njd->qnij", query, document, dtype=np.float64).max(3).sum(2)
    np.testing.assert_allclose(maxsim(query, document), expected, rtol=1e-5)


def test_padding_is_never_a_maximum():
    rng = np.random.default_rng(0)
    query = vectors(rng, 3, 2, 4)
    document = -np.repeat(query.mean(1, keepdims=True), 5, 1)  # mostly negative similarities, which a row of zeros would exceed
    mask = np.arange(5) < np.array([[1], [3], [5]])
    document[~mask] = 0
    expected = np.stack([maxsim_scores(query, document[n : n + 1, : mask[n].sum()])[:, 0] for n in range(3)], 1)
    np.testing.assert_allclose(maxsim(query, document, document_mask=mask), expected, rtol=1e-5)
    assert np.isneginf(maxsim(query, document, document_mask=np.zeros_like(mask))).all()


def test_runs_under_jit_and_takes_bfloat16():
    rng = np.random.default_rng(0)
    query, document = (jnp.asarray(vectors(rng, 3, r, 8), jnp.bfloat16) for r in (2, 4))
    scores = jax.jit(maxsim, static_argnames="budget")(query, document, budget=(1, 3))
    expected = maxsim_scores(np.asarray(query[:, :1], np.float32), np.asarray(document[:, :3], np.float32))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_no_chip_rounds_float32():
    """The program of a search includes the TPU kernel."""
    vectors = jax.ShapeDtypeStruct((32, 16, 128), jnp.float32)
    traced = jax.jit(maxsim).trace(vectors, vectors)
    assert not rounded_in_kernels(traced.jaxpr.jaxpr)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not rounded(text) and (products(text) or "tpu_custom_call" in text)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused():
    query, document = np.zeros((2, 3, 4)), np.zeros((5, 6, 4))
    for budget in ((4, 6), (3, 7), (0, 1), (1,), 3, (1.5, 2), (float("inf"), 1), (1, 1, 5), (1, 1, -1)):
        with pytest.raises(UserError, match="budget"):
            maxsim(query, document, budget)
    with pytest.raises(UserError, match="one D"):
        maxsim(query[..., :3], document)
    with pytest.raises(UserError, match="one D"):
        maxsim(query[0], document)
    for pair in ((query[:, :0], document), (query, document[:, :0]), (query[..., :0], document[..., :0])):
        with pytest.raises(UserError, match="expected at least one vector"):
            maxsim(*pair)
    for wrong in ([[[1.0]], [[1.0], [2.0]]], "text", None, document.astype(object)):
        with pytest.raises(UserError, match="document: expected an array of numbers"):
            maxsim(query, wrong)
    with pytest.raises(UserError, match="query has complex numbers"):
        maxsim(query * 1j, document)
    with pytest.raises(UserError, match="document_mask"):
        maxsim(query, document, document_mask=np.ones((5, 5), bool))
    with pytest.raises(UserError, match="document_scale"):
        maxsim(query, document, document_scale=np.ones((5, 6, 4)))
