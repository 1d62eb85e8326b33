"""The public API on directories saved by transformers, against transformers' own forward pass, on unit vectors."""

import jax
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.backbones.qwen3_vl.network import VisionTower
from metaembed_jax.inputs.examples import ShapeClass
from metaembed_jax.model import as_item
from metaembed_jax.sharding import make_mesh
from tests.backbones.qwen2_5_vl.reference import CANDIDATES, QUERIES, TEXTS
from tests.backbones.qwen3_vl.reference import CONFIGURATIONS, reference

TOLERANCE = dict(rtol=0, atol=1e-5)  # float32 leaves 9e-7
ROWS = 8  # of a batch


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    """A checkpoint's model, with the reference's Meta Tokens, and the reference."""
    expected = reference(request.param, tmp_path_factory.mktemp("references"))
    model = me.MetaEmbed.from_pretrained(expected.directory, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]))
    model.parameters["meta_tokens"] = jax.device_put(expected.meta_tokens, model.parameters["meta_tokens"].sharding)
    return model, expected


def test_vectors_equal_transformers(case):
    model, expected = case
    np.testing.assert_allclose(model.encode_query(QUERIES, batch_size=ROWS), expected.query, **TOLERANCE)
    np.testing.assert_allclose(model.encode_document(CANDIDATES, batch_size=ROWS), expected.candidate, **TOLERANCE)


def test_one_batch_of_images_and_texts_equals_transformers(case):
    """The API encodes texts without the vision tower; here one batch holds both, as a training batch may."""
    model, expected = case
    for side, items, process in (("query", QUERIES, model.processor.query), ("candidate", CANDIDATES, model.processor.candidate)):
        examples = [process(as_item(item)) for item in items]
        vectors = model._encode_batch(examples, ShapeClass(128, 256), side, model.config.vectors(side), ROWS)
        np.testing.assert_allclose(vectors, getattr(expected, side), **TOLERANCE)


def test_the_reference_tells_its_vectors_apart(case):
    """Agreement says little about vectors that are all alike."""
    _, expected = case
    for vectors in (expected.query, expected.candidate):
        flat = vectors.reshape(-1, vectors.shape[-1])
        assert np.abs(np.linalg.norm(flat, axis=-1) - 1).max() < 1e-5
        assert np.median(np.abs(vectors[1:] - vectors[:-1]).max(axis=-1)) > 1e-2  # between items
        assert np.median(np.abs(vectors[:, 1:] - vectors[:, :-1]).max(axis=-1)) > 1e-2  # between rows of an item


@pytest.mark.parametrize("case", ["shallow"], indirect=True)
def test_texts_alone_never_run_the_tower(case, monkeypatch):
    model, expected = case
    fresh = me.MetaEmbed(model.config, model.parameters, model.processor, model.mesh)

    def run(*arguments, **keywords):
        raise AssertionError("the tower runs")

    monkeypatch.setattr(VisionTower, "__call__", run)
    np.testing.assert_allclose(fresh.encode_query(TEXTS, batch_size=3), expected.query[: len(TEXTS)], **TOLERANCE)
    with pytest.raises(AssertionError, match="the tower runs"):
        fresh.encode_query(QUERIES[-1:], batch_size=3)
