"""The public API on directories saved by transformers, against transformers' own forward pass, on unit vectors."""

import jax
import numpy as np
import pytest

from metaembed_jax.inputs.examples import ShapeClass
from metaembed_jax.model import as_item
from tests.backbones.llama_vision.reference import CANDIDATES, CONFIGURATIONS, QUERIES, read, reference

TOLERANCE = dict(rtol=0, atol=1e-5)  # float32 leaves 8e-7
ROWS = 8  # of a batch
ITEMS = {"query": QUERIES, "candidate": CANDIDATES}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    """A checkpoint's model, with the reference's Meta Tokens, and the reference."""
    expected = reference(request.param, tmp_path_factory.mktemp("references"))
    model = read(expected.directory)
    model.parameters["meta_tokens"] = jax.device_put(expected.meta_tokens, model.parameters["meta_tokens"].sharding)
    return model, expected


def examples_of(model, side):
    process = getattr(model.processor, side)
    return [process(as_item(item)) for item in ITEMS[side]]


def encode(model, examples, side, shape):
    return model._encode_batch(examples, shape, side, model.config.vectors(side), ROWS)[: len(examples)]


def test_vectors_equal_transformers(case):
    model, expected = case
    np.testing.assert_allclose(model.encode_query(QUERIES, batch_size=ROWS), expected.query, **TOLERANCE)
    np.testing.assert_allclose(model.encode_document(CANDIDATES, batch_size=ROWS), expected.candidate, **TOLERANCE)


@pytest.mark.parametrize("side", ITEMS)
def test_one_batch_of_images_and_texts_equals_transformers(case, side):
    """Images of several tilings beside texts, which transformers computes in batches of their own; left padding."""
    model, expected = case
    examples = examples_of(model, side)
    most = max(example.patches for example in examples)
    assert len({example.patches for example in examples}) > 2
    np.testing.assert_allclose(encode(model, examples, side, ShapeClass(64, most)), getattr(expected, side), **TOLERANCE)


@pytest.mark.parametrize("more", [0, 1, 7])
def test_the_tiles_of_a_class_change_nothing(case, more):
    """Neither fewer than an image may have, nor more."""
    model, expected = case
    examples = examples_of(model, "candidate")
    row = min((row for row, example in enumerate(examples) if example.patches), key=lambda row: examples[row].patches)
    shape = ShapeClass(40, examples[row].patches + more * model.config.architecture.patch_multiple)
    found = encode(model, [examples[row]], "candidate", shape)
    np.testing.assert_allclose(found[0], expected.candidate[row], **TOLERANCE)


def test_the_reference_tells_its_vectors_apart(case):
    """Agreement says little about vectors that are all alike."""
    _, expected = case
    for vectors in (expected.query, expected.candidate):
        assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 1e-5
        assert np.median(np.abs(vectors[1:] - vectors[:-1]).max(axis=-1)) > 1e-2  # between items
        assert np.median(np.abs(vectors[:, 1:] - vectors[:, :-1]).max(axis=-1)) > 1e-2  # between rows of an item
