"""The sharded search against all scores on one device."""

import jax
import numpy as np
import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.late_interaction.topk import top_k
from metaembed_jax.sharding import make_mesh

MESH = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_equals_unsharded(k):
    rng = np.random.default_rng(0)
    query, candidate = (rng.standard_normal(shape, np.float32) for shape in ((3, 4, 16), (40, 6, 16)))
    candidate[33] = candidate[2]  # a tie, in another shard
    scores, rows = top_k(query, candidate, k, make_mesh(**MESH))
    wanted_scores, wanted_rows = jax.lax.top_k(maxsim(query, candidate), k)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-6)


@pytest.mark.parametrize("candidates, k, message", [(9, 1, "9 candidates do not divide"), (8, 9, "k=9"), (8, 0, "k=0")])
def test_refuses(candidates, k, message):
    with pytest.raises(UserError, match=message):
        top_k(np.ones((1, 2, 4)), np.ones((candidates, 2, 4)), k, make_mesh(**MESH))
