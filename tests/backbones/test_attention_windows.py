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
from metaembed_jax.mesh import make_mesh
from metaembed_jax.planning.cost import count
from metaembed_jax.planning.topology import topology
from metaembed_jax.sharding import BATCH_AXES

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


@pytest.mark.parametrize("heads, width", [(4, 64), (3, 128)])
def test_a_mesh_splits_rows_and_whole_heads(heads, width):
    """Gradients in a scan that is computed again; three heads are on both devices of the tensor axis."""
    inputs = noise(4, 64, heads, width, 32, "float32")

    def stack(attend):
        def run(query, key, value, *context):
            def layer(query, _):
                return attend(query, key, value, *context), None

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return run

    by_xla = partial(xla, heads=heads, window=32)
    by_kernel = partial(on_each_device, partial(kernel, window=32, interpret=True), heads)
    expected = output_and_gradients(stack(by_xla), *inputs)
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        assert_close(output_and_gradients(stack(by_kernel), *inputs), expected, 4e-6)


@pytest.mark.parametrize(
    "heads, width, window, dtype, expected",
    [
        (16, 80, 64, "bfloat16", True),
        (8, 80, 64, "float32", True),
        (4, 80, 64, "bfloat16", False),  # 320 lanes are no whole registers
        (2, 64, 36, "float32", False),  # nor are windows of 36 whole tiles
        (16, 80, 64, "float16", False),
    ],
)
def test_which_shapes_the_kernel_takes(heads, width, window, dtype, expected):
    assert takes(heads, width, window, dtype) == expected


def compiled_gradient(mesh, B, P, heads, width, dtype):
    """Output and gradients, through the TPU's compiler."""
    axes = {"heads": (BATCH_AXES, None, "tensor"), "rows": (BATCH_AXES,)}
    heads_sharding, rows = (NamedSharding(mesh, PartitionSpec(*names)) for names in axes.values())
    array = jax.ShapeDtypeStruct((B, P, heads * width), dtype, sharding=heads_sharding)
    angles = jax.ShapeDtypeStruct((B, P, width), jnp.float32, sharding=rows)
    windows = jax.ShapeDtypeStruct((B, P), jnp.int32, sharding=rows)

    def run(query, key, value, cotangent, *context):
        output, pull = jax.vjp(lambda *x: window_attention(*x, *context, heads=heads, window=64), query, key, value)
        return output, *pull(cotangent)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(array, array, array, array, angles, angles, windows).compile()


absent = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it holds no programs of absent chips


@absent
@pytest.mark.parametrize(
    "name, dtype, most", [("v5e:1x1", "bfloat16", 1.1), ("v6e:1x1", "bfloat16", 1.0), ("v5e:1x1", "float32", 1.0)]
)
def test_pages_move_nothing_but_arrays(name, dtype, most):
    """Seven inputs and four outputs; angles and, on v5e, copies of them are the rest. XLA moves nine times as much."""
    pytest.importorskip("libtpu")
    compiled = compiled_gradient(make_mesh(devices=topology(name).devices), 8, 5120, 16, 80, dtype)
    array, angles = 8 * 5120 * 1280 * jnp.dtype(dtype).itemsize, 8 * 5120 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < array / 2
    assert count(compiled.as_text(), 1).hbm_bytes < most * (11 * array + 4 * angles)


@absent
def test_a_tpu_mesh_gathers_nothing():
    pytest.importorskip("libtpu")
    text = compiled_gradient(make_mesh(2, 2, 2, devices=topology("v5e:2x4").devices), 4, 256, 16, 80, "bfloat16").as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward
    assert "all-" not in text
