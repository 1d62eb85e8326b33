"""The TPU kernel of survivors, run by Pallas' interpreter against the kernel of all documents, and compiled by the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from metaembed_jax.late_interaction import maxsim_tpu, survivors_tpu
from metaembed_jax.late_interaction.survivors_tpu import score_survivors
from metaembed_jax.planning.topology import topology

Q, K, Rq, T, R, n, D, USED = 3, 70, 2, 2, 4, 128, 128, 3


@pytest.mark.parametrize("dtype, slots_of_a_call", [("bfloat16", 2**17), ("float32", 150), ("int8", 32)])
def test_scores_are_those_of_all_documents(dtype, slots_of_a_call, monkeypatch):
    """Survivors of a query take several tiles on the chip, and several steps; a query without any on this device takes none."""
    monkeypatch.setattr(maxsim_tpu, "BLOCK_BYTES", 1)
    monkeypatch.setattr(survivors_tpu, "SLOTS", slots_of_a_call)
    rng = np.random.default_rng(0)
    query, vectors = jnp.asarray(rng.normal(size=(Q, Rq, D)), jnp.float32), rng.normal(size=(T, R, n, D)) * 30
    vectors = jnp.asarray(np.round(vectors).clip(-127, 127) if dtype == "int8" else vectors, dtype)
    scales = jnp.asarray(rng.random((T, R, n)), jnp.float32) if dtype == "int8" else None
    counts = jnp.asarray(rng.integers(0, R + 1, (T, n)), jnp.int32)
    slots = np.stack([rng.permutation(T * n)[:K] for _ in range(Q)]).astype(np.int32)
    slots[0, rng.random(K) < 0.2] = -1
    slots[0, :30] = slots[0, 60:] = -1
    slots[1] = -1
    arrays = query, vectors, scales, counts
    scores = np.asarray(score_survivors(*arrays, jnp.asarray(slots), USED, expected=1, interpret=True))
    of_all = np.asarray(maxsim_tpu.score(*arrays, USED, interpret=True))
    np.testing.assert_array_equal(scores, np.where(slots < 0, -np.inf, np.take_along_axis(of_all, slots, axis=1)))


def test_narrow_documents_are_not_gathered_either():
    query, vectors = (jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32) for shape in ((2, 2, 8), (1, 2, n, 8)))
    slots = jnp.asarray([[3, -1], [127, 0]])
    scores = np.asarray(score_survivors(query, vectors, None, None, slots, 2, expected=1, interpret=True))
    similarities = np.einsum("qid,jnd->qijn", np.float64(query), np.float64(vectors)[0]).max(2).sum(1)
    expected = [[similarities[0, 3], -np.inf], [similarities[1, 127], similarities[1, 0]]]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it holds no programs of absent chips
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_nothing_is_gathered(dtype):
    pytest.importorskip("libtpu")
    device = SingleDeviceSharding(topology("v5e:2x4").devices[0])
    shapes = [((2, 16, 3584), "float32"), ((98, 64, n, 3584), dtype), ((98, 64, n), "float32"), ((98, n), "int32")]
    query, vectors, scales, counts = (jax.ShapeDtypeStruct(*shape, sharding=device) for shape in shapes)
    slots = jax.ShapeDtypeStruct((2, 1000), "int32", sharding=device)
    arrays = query, vectors, scales if dtype == "int8" else None, counts, slots
    program = jax.jit(lambda *arrays: score_survivors(*arrays, 64, expected=125)).lower(*arrays).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**21  # the survivors have 437 MiB in int8
