"""Attention inside windows by XLA, and by the TPU's kernel in Pallas' interpreter and through the TPU's compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from metaembed_jax.backbones.attention_windows import kernel, on_each_device, window_attention, xla
from metaembed_jax.backbones.attention_windows_tpu import takes
from metaembed_jax.backbones.qwen.network import patch_angles
from metaembed_jax.planning.chips import topology
from metaembed_jax.sharding import BATCH_AXES, make_mesh

CASES = {  # B, P, H, K, window, dtype, tolerance
    "page": (2, 256, 8, 80, 64, "float32", 2e-6),
    "tiles are not whole": (3, 64, 2, 64, 64, "float32", 2e-6),
    "small windows": (1, 144, 3, 128, 16, "float32", 2e-6),
    "bfloat16": (1, 256, 8, 80, 64, "bfloat16", 1e-2),
}


def noise(B, P, H, K, window, dtype):
    """Random projections, a cotangent that is 0 at padding, angles; slots of one window, of several, and with padding."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=(B, P, H * K)), dtype) for _ in range(4))
    sizes = rng.integers(1, window, (B, P // window, 2)).cumsum(2)
    windows = (np.arange(window) >= sizes[..., :1]) + (np.arange(window) >= sizes[..., 1:]) * -2
    windows[:, 0] = 0
    windows = windows.reshape(B, P).astype(np.int32)
    cos, sin = patch_angles(jnp.asarray(rng.integers(0, 60, (B, P, 2))), K)
    return (query, key, value), (cos, sin, windows), jnp.where(windows[..., None] < 0, 0, cotangent)


def output_and_gradients(attend, arrays, context, cotangent):
    def run(arrays, context, cotangent):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, *context), *arrays)
        return output, *pull(cotangent)

    with jax.default_matmul_precision("highest"):
        return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays, context, cotangent)]


def definition(arrays, context, cotangent, heads, window):
    """The same in float64, without windows: every patch with all of its row, most of them masked."""
    query, key, value, cotangent, cos, sin = (np.float64(x) for x in (*arrays, cotangent, *context[:2]))
    B, P, D = query.shape
    K, windows = D // heads, context[2]
    turn = np.eye(K, k=K // 2) - np.eye(K, k=-K // 2)

    def split(x):
        return x.reshape(B, P, heads, K)

    def rotated(x):
        return split(x) * cos[:, :, None] + split(x) @ turn * sin[:, :, None]

    def turned_back(x):
        return x * cos[:, :, None] + (x * sin[:, :, None]) @ turn.T

    group = np.arange(P) // window * (window + 1) + windows
    visible = (group[:, :, None] == group[:, None, :])[:, None]
    query, key, value, cotangent = rotated(query), rotated(key), split(value), split(cotangent)
    scores = np.einsum("bshk,bthk->bhst", query, key) * K**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * visible
    weights /= weights.sum(-1, keepdims=True)
    toward = np.einsum("bshk,bthk->bhst", cotangent, value)
    toward = weights * (toward - (weights * toward).sum(-1, keepdims=True)) * K**-0.5
    results = (
        np.einsum("bhst,bthk->bshk", weights, value),
        turned_back(np.einsum("bhst,bthk->bshk", toward, key)),
        turned_back(np.einsum("bhst,bshk->bthk", toward, query)),
        np.einsum("bhst,bshk->bthk", weights, cotangent),
    )
    return [x.reshape(B, P, D) for x in results]


def assert_close(results, expected, tolerance):
    for ours, theirs in zip(results, expected, strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_kernel_and_xla_equal_the_definition(case):
    *sizes, window, dtype, tolerance = CASES[case]
    heads, inputs = sizes[2], noise(*sizes, window, dtype)
    assert takes(heads, sizes[3], window, dtype)
    expected = definition(*inputs, heads, window)
    assert_close(output_and_gradients(partial(kernel, window=window, interpret=True), *inputs), expected, tolerance)
    assert_close(output_and_gradients(partial(window_attention, heads=heads, window=window), *inputs), expected, tolerance)
