"""Batches: padding on the left and at the end, and what does not fit."""

import numpy as np
import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import ArraySpec, Example, Layout, ShapeClass, blank, collate

LAYOUT = Layout(
    tokens={"places": ArraySpec((2,), "int32"), "kind": ArraySpec((), "int8", fill=-1)},
    patches={"pixels": ArraySpec((5,), "uint8"), "patch_mask": ArraySpec((), "bool"), "tile": ArraySpec((), "int32", fill=7)},
)


def example(tokens, patches=0, seed=0):
    """Noise of this layout."""
    random = np.random.default_rng(seed)
    image = {
        "pixels": random.integers(1, 256, (patches, 5), np.uint8),
        "patch_mask": random.integers(0, 2, patches).astype(bool),
        "tile": random.integers(0, 5, patches).astype(np.int32),
    }
    arrays = {"places": random.integers(1, 9, (2, tokens)).astype(np.int32), "kind": random.integers(0, 3, tokens).astype(np.int8)}
    return Example(random.integers(1, 99, tokens).astype(np.int32), arrays, image if patches else {})


def test_tokens_are_padded_on_the_left_and_patches_at_the_end():
    examples = [example(3, seed=1), example(6, patches=4, seed=2), example(1, patches=8, seed=3)]
    batch = collate(examples, ShapeClass(tokens=6, patches=8), LAYOUT)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((3, 6), "int32"),
        "mask": ((3, 6), "bool"),
        "places": ((3, 2, 6), "int32"),
        "kind": ((3, 6), "int8"),
        "pixels": ((3, 8, 5), "uint8"),
        "patch_mask": ((3, 8), "bool"),
        "tile": ((3, 8), "int32"),
    }
    for row, one in enumerate(examples):
        n, p = len(one.tokens), one.patches
        assert batch["mask"][row].tolist() == [False] * (6 - n) + [True] * n
        for name, array in {"tokens": one.tokens, **one.token_arrays}.items():
            np.testing.assert_array_equal(batch[name][row, ..., 6 - n :], array)
            assert (batch[name][row, ..., : 6 - n] == (-1 if name == "kind" else 0)).all()
        for name, array in one.patch_arrays.items():
            np.testing.assert_array_equal(batch[name][row, :p], array)
        for name, spec in LAYOUT.patches.items():
            assert (batch[name][row, p:] == spec.fill).all()


def test_a_class_without_patches_has_no_arrays_of_them():
    assert set(collate([example(3)], ShapeClass(6, 0), LAYOUT)) == {"tokens", "mask", "places", "kind"}


def test_a_blank_has_one_token_and_no_image():
    batch = collate([blank(LAYOUT)], ShapeClass(3, 2), LAYOUT)
    assert batch["mask"].tolist() == [[False, False, True]] and not batch["patch_mask"].any()
    assert not batch["tokens"].any() and (batch["kind"] == -1).all()


@pytest.mark.parametrize("shape", [ShapeClass(6, 0), ShapeClass(6, 4), ShapeClass(2, 8)])
def test_what_does_not_fit_is_refused(shape):
    examples = [example(1), example(6 if shape.tokens < 6 else 3, patches=8)]
    with pytest.raises(UserError, match=f"^row 1 .* holds {shape.tokens} and {shape.patches}"):
        collate(examples, shape, LAYOUT)
