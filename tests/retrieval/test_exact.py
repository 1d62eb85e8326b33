"""Exact vectors next to those of int8: what is stored, and what carries it."""

import jax
import ml_dtypes
import numpy as np
import pytest

import metaembed_jax as me
from metaembed_jax.mesh import make_mesh
from metaembed_jax.retrieval.ingest import rounding_errors, to_int8
from tests.retrieval.reference import unit

ONE = make_mesh(devices=jax.devices()[:1])


def stored(index):
    """Return the exact vectors and the errors of all items that are not deleted, by id."""
    items = {}
    for segment in index._segments:
        for ids, _, arrays in segment.items(7):
            exact = np.concatenate([arrays[file.path.name] for file in segment.exact], axis=1)
            errors = np.concatenate([arrays[file.path.name] for file in segment.errors], axis=1)
            items |= dict(zip(ids, zip(exact, errors, strict=True), strict=True))
    return items


@pytest.mark.parametrize("exact", ["float32", "bfloat16"])
def test_exact_vectors_are_kept_by_every_change(tmp_path, exact):
    vectors = unit(np.random.default_rng(0), 12, 9, 8)
    index = me.Index.build(vectors[:8], map(str, range(8)), dtype="int8", exact=exact, path=tmp_path / "index", mesh=ONE)
    index.add(list(vectors[8:, :3]), map(str, range(8, 12)))
    index.delete(["3"])
    index.save(tmp_path / "copy")
    index.compact()
    for copy in (index, me.Index.load(tmp_path / "copy", mesh=ONE)):
        copy.verify()
        items = stored(copy)
        assert [*items] == [str(n) for n in range(12) if n != 3]
        for n, (vectors_RD, errors_R) in items.items():
            expected = vectors[int(n)].astype(exact)
            count = 9 if int(n) < 8 else 3
            np.testing.assert_array_equal(vectors_RD[:count], expected[:count])
            assert vectors_RD.dtype == exact and not vectors_RD[count:].any() and not errors_R[count:].any()
            numbers, scales = to_int8(vectors[int(n)][None])
            lengths = np.linalg.norm(expected.astype(float) - numbers[0] * scales[0].astype(float)[:, None], axis=-1)[:count]
            assert errors_R.dtype == np.float16 and (errors_R[:count] >= lengths).all()
            np.testing.assert_allclose(errors_R[:count], lengths, rtol=2e-3)
    assert f"int8 + {exact}" in repr(index)


def test_errors_are_rounded_up():
    numbers, scales = np.ones((5, 1, 1), np.int8), np.array([[1], [1], [1], [1e-9], [1e30]], np.float32)
    exact = np.array([1, 1 + 2**-22, 1 + 2**-10 + 2**-21, 0, 0], np.float32)[:, None, None]
    errors = rounding_errors(exact, numbers, scales)[:, 0].astype(float)
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    assert errors[0] == 0 and errors[1] == 2**-22 + smallest and errors[3] == smallest and np.isinf(errors[4])
    assert errors[2] == 2**-10 + 2**-20
    widths = np.random.default_rng(1).normal(size=(50, 4, 3)).astype(ml_dtypes.bfloat16)
    numbers, scales = to_int8(widths.astype(np.float32))
    lengths = np.linalg.norm(widths.astype(float) - numbers * scales.astype(float)[..., None], axis=-1)
    assert (rounding_errors(widths, numbers, scales) >= lengths).all()


@pytest.mark.parametrize(
    "types, message",
    [
        ({"dtype": "int8", "exact": "float64"}, "exact='float64': expected bfloat16 or float32"),
        ({"dtype": "int8", "exact": ["float32"]}, "expected bfloat16 or float32"),
        ({"exact": "float32"}, "exact='float32' of an index of bfloat16: expected dtype='int8'"),
    ],
)
def test_wrong_types_are_refused(types, message):
    with pytest.raises(me.UserError, match=message):
        me.Index.build(np.eye(8, dtype=np.float32)[None], **types)
