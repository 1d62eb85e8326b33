"""Sharded search against all scores on one device."""

import jax
import numpy as np
import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.late_interaction.topk import top_k
from metaembed_jax.mesh import make_mesh

MESH = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_equals_unsharded(k):
    rng = np.random.default_rng(0)
    query, document = (rng.standard_normal(shape, np.float32) for shape in ((3, 4, 16), (40, 6, 16)))
    document[33] = document[2]  # a tie, in another shard
    scores, rows = top_k(query, document, k, make_mesh(**MESH))
    expected_scores, expected_rows = jax.lax.top_k(maxsim(query, document), k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


@pytest.mark.parametrize("documents, k, message", [(9, 1, "9 documents do not divide"), (8, 9, "k=9"), (8, 0, "k=0")])
def test_refuses(documents, k, message):
    with pytest.raises(UserError, match=message):
        top_k(np.ones((1, 2, 4)), np.ones((documents, 2, 4)), k, make_mesh(**MESH))
