"""Llama-3.2-Vision on directories saved by transformers, against transformers' own forward pass, on unit vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.inputs.examples import ShapeClass, collate
from tests.backbones.llama_vision.reference import CANDIDATES, CONFIGURATIONS, QUERIES, read, reference

TOLERANCE = dict(rtol=0, atol=1e-5)  # float32 leaves 8e-7
SIDES = {"query": (QUERIES, 16, 16), "candidate": (CANDIDATES, 80, 64)}


class Case:
    """A checkpoint on our side, and the reference."""

    def __init__(self, name, scratch):
        self.expected = reference(name, scratch)
        self.ours = read(self.expected.directory)
        self.tile = self.ours.config.patch_multiple
        self.run = jax.jit(
            functools.partial(self.ours.backbone, dtype=jnp.float32, checkpoint=False, unroll=1), static_argnames="keep"
        )

    def examples(self, side):
        process = getattr(self.ours.processor, side)
        return [process(item if isinstance(item, dict) else {"text": item}) for item in SIDES[side][0]]

    def vectors(self, examples, side, shape):
        _, rows, keep = SIDES[side]
        batch = collate(examples, shape, self.ours.config.layout)
        states = np.asarray(self.run(batch, self.expected.meta_tokens[:rows], keep=keep))
        return states / np.linalg.norm(states, axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("side", SIDES)
def test_one_batch_of_images_and_texts_equals_transformers(case, side):
    """Images of several tilings beside texts, which transformers computes in batches of their own; left padding."""
    examples = case.examples(side)
    most = max(example.patches for example in examples)
    assert len({example.patches for example in examples}) > 2
    np.testing.assert_allclose(case.vectors(examples, side, ShapeClass(64, most)), getattr(case.expected, side), **TOLERANCE)


def test_texts_alone_equal_transformers(case):
    """Without the vision tower and the cross-attention layers."""
    texts = [row for row, example in enumerate(case.examples("query")) if not example.patches]
    found = case.vectors([case.examples("query")[row] for row in texts], "query", ShapeClass(40, 0))
    np.testing.assert_allclose(found, case.expected.query[texts], **TOLERANCE)


@pytest.mark.parametrize("more", [0, 1, 7])
def test_the_tiles_of_a_class_change_nothing(case, more):
    """Neither fewer than an image may have, nor more."""
    examples = case.examples("candidate")
    row = min((row for row, example in enumerate(examples) if example.patches), key=lambda row: examples[row].patches)
    shape = ShapeClass(40, examples[row].patches + more * case.tile)
    found = case.vectors([examples[row]], "candidate", shape)
    np.testing.assert_allclose(found[0], case.expected.candidate[row], **TOLERANCE)


def test_the_reference_tells_its_vectors_apart(case):
    """Agreement says little about vectors that are all alike."""
    for vectors in (case.expected.query, case.expected.candidate):
        assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 1e-5
        assert np.median(np.abs(vectors[1:] - vectors[:-1]).max(axis=-1)) > 1e-2  # between items
        assert np.median(np.abs(vectors[:, 1:] - vectors[:, :-1]).max(axis=-1)) > 1e-2  # between rows of an item
