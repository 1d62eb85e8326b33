"""Vectors of an image, however many tiles its shape class holds, against transformers' own."""

import jax
import numpy as np
import pytest

from metaembed_jax.inputs.examples import ShapeClass
from metaembed_jax.model import as_item
from tests.backbones.llama_vision.reference import CANDIDATES, CONFIGURATIONS, read, reference

TOLERANCE = dict(rtol=0, atol=1e-5)  # float32 leaves 8e-7


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request, tmp_path_factory):
    """A checkpoint's model, with the reference's Meta Tokens, and the reference."""
    expected = reference(request.param, tmp_path_factory.mktemp("references"))
    model = read(expected.directory)
    model.parameters["meta_tokens"] = jax.device_put(expected.meta_tokens, model.parameters["meta_tokens"].sharding)
    return model, expected


@pytest.mark.parametrize("more", [0, 1, 7])
def test_the_tiles_of_a_class_change_nothing(case, more):
    """Neither fewer than an image may have, nor more."""
    model, expected = case
    examples = [model.processor.candidate(as_item(item)) for item in CANDIDATES]
    row = min((row for row, example in enumerate(examples) if example.patches), key=lambda row: examples[row].patches)
    shape = ShapeClass(40, examples[row].patches + more * model.config.architecture.patch_multiple)
    found = model._encode_batch([examples[row]], shape, "candidate", 64, rows=1)
    np.testing.assert_allclose(found[0], expected.candidate[row], **TOLERANCE)
