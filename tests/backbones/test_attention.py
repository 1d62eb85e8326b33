"""The TPU's kernel, run by Pallas' interpreter, against XLA's attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaembed_jax.backbones.attention import _splash, _xla
from metaembed_jax.sharding import make_mesh

CASES = {  # B, S, T, H, G, K, causal
    "grouped": (2, 600, 600, 4, 2, 64, True),
    "keep": (2, 16, 600, 4, 1, 128, True),
    "vision": (2, 200, 200, 2, 2, 80, False),
}


def noise(B, S, T, H, G, K, causal, dtype):
    """Queries, keys and values, a mask with left padding in the second row, and a cotangent that reads no padding."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K))
    )
    mask_BT = np.arange(T) >= np.array([[0], [77]])
    return (query, key, value), mask_BT, cotangent * mask_BT[:, -S:, None, None].astype(dtype)


def output_and_gradients(attend, arrays, mask_BT, cotangent):
    def run(arrays, mask_BT, cotangent):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, mask_BT), *arrays)
        return output * (cotangent != 0), *pull(cotangent)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays, mask_BT, cotangent)]


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_splash_equals_xla(case, dtype, tolerance):
    *sizes, causal = CASES[case]
    inputs = noise(*sizes, causal, dtype)
    found = output_and_gradients(partial(_splash, causal=causal, interpret=True), *inputs)
    assert_close(found, output_and_gradients(partial(_xla, causal=causal), *inputs), tolerance)
