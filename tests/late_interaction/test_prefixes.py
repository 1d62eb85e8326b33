"""Cut vectors against their definition in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import metaembed_jax as me
from tests.retrieval.reference import cut, unit


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_unit_vectors_of_the_first_numbers(dtype, width):
    vectors = unit(np.random.default_rng(0), 4, 3, 8).astype(dtype)
    vectors[1, 2, :3] = 0
    expected = cut(vectors, width)
    for given in (vectors, jnp.asarray(vectors)):
        prefix = me.unit_prefix(given, width)
        assert prefix.dtype == np.float32 and prefix.shape == (4, 3, width) and isinstance(prefix, type(given))
        np.testing.assert_allclose(prefix, expected, rtol=3e-7)
    assert width == 7 or not expected[1, 2].any()


def test_whole_vectors_stay_as_they_are():
    vectors = unit(np.random.default_rng(0), 2, 8)
    assert me.unit_prefix(vectors, 8) is vectors is me.unit_prefix(vectors, 0)
    for width in (9, -1, 1.5, "8"):
        with pytest.raises(me.UserError, match="expected 0 .all. to 8"):
            me.unit_prefix(vectors, width)
