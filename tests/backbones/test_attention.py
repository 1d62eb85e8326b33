"""Every implementation of attention, as a CPU can run it, against the definition; and the one that each program gets."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from metaembed_jax.backbones import attention as module
from metaembed_jax.backbones import attention_xla
from metaembed_jax.backbones.attention import attention, attention_implementation, on_each_device
from metaembed_jax.backbones.attention_cudnn import cudnn
from metaembed_jax.backbones.attention_splash import splash
from metaembed_jax.backbones.attention_xla import in_blocks, xla
from metaembed_jax.sharding import BATCH_AXES, make_mesh

CAUSAL = dict(causal=True)
CASES = {  # B, S, T, H, G, K, kind, dtype, tolerance
    "grouped": (3, 520, 520, 4, 2, 32, CAUSAL, "float32", 1e-5),
    "bfloat16": (3, 200, 200, 4, 2, 64, CAUSAL, "bfloat16", 2e-2),
    "keep": (3, 16, 600, 4, 1, 128, CAUSAL, "float32", 1e-5),
    "vision": (3, 200, 200, 2, 2, 80, dict(causal=False), "float32", 1e-5),
    "crossed": (2, 133, 200, 14, 2, 81, dict(causal=False, scale=0.1), "float32", 1e-5),
    "capped": (3, 200, 200, 4, 2, 72, dict(causal=False, scale=0.3, softcap=1.5), "float32", 1e-5),
    "window": (3, 300, 300, 4, 2, 64, CAUSAL | dict(window=40), "float32", 1e-5),
    "keep_capped_window": (3, 80, 600, 4, 1, 64, CAUSAL | dict(scale=0.3, softcap=1.5, window=100), "float32", 1e-5),
}
# Each implementation with a substitute for its chip.
IMPLEMENTATIONS = {
    "splash": partial(splash, interpret=True),
    "cudnn": partial(cudnn, implementation="xla"),
    "blocks": in_blocks,
    "xla": xla,
}
FOR_CUDNN = ("grouped", "bfloat16", "vision", "crossed")
PAIRS = [(name, case) for name in IMPLEMENTATIONS for case in CASES if name != "cudnn" or case in FOR_CUDNN]


def noise(B, S, T, H, G, K, dtype):
    """Random queries, keys and values; a mask with holes and growing left padding, up to all; a cotangent that is 0 at padding."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K))
    )
    mask_BT = (np.arange(T) >= np.linspace(0, T, B)[:, None]) & (np.arange(T) % 7 != 3)
    return (query, key, value), mask_BT, cotangent * mask_BT[:, -S:, None, None].astype(dtype)


def output_and_gradients(attend, arrays, mask_BT, cotangent):
    """The output where the cotangent reads it, and the gradients, in float32."""

    def run(arrays, mask_BT, cotangent):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, mask_BT), *arrays)
        return output * (cotangent != 0), *pull(cotangent)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays, mask_BT, cotangent)]


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def definition(arrays, mask_BT, cotangent, *, causal, scale=None, softcap=None, window=None):
    """The same by the definition of attention, in float64."""
    query, key, value, cotangent = (np.float64(x) for x in (*arrays, cotangent))
    (B, S, H, K), (_, T, G, _) = query.shape, key.shape
    scale = K**-0.5 if scale is None else scale
    positions_S1, keys_T = np.arange(T - S, T)[:, None], np.arange(T)
    visible = mask_BT[:, None, None, :]
    if causal:
        visible = visible & (keys_T <= positions_S1) & (keys_T > positions_S1 - (window or T))
    key_BTHK, value_BTHK = (np.repeat(x, H // G, axis=2) for x in (key, value))
    scores = scale * np.einsum("bshk,bthk->bhst", query, key_BTHK)
    slope = scale
    if softcap is not None:
        bent = np.tanh(scores / softcap)
        scores, slope = softcap * bent, scale * (1 - bent**2)
    weights = np.exp(scores) * visible
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    toward = np.einsum("bshk,bthk->bhst", cotangent, value_BTHK)
    toward = weights * (toward - (weights * toward).sum(-1, keepdims=True)) * slope
    heads = B, T, G, H // G, K
    return (
        np.einsum("bhst,bthk->bshk", weights, value_BTHK) * (cotangent != 0),
        np.einsum("bhst,bthk->bshk", toward, key_BTHK),
        np.einsum("bhst,bshk->bthk", toward, query).reshape(heads).sum(3),
        np.einsum("bhst,bshk->bthk", weights, cotangent).reshape(heads).sum(3),
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few queries."""
    monkeypatch.setattr(attention_xla, "SCORE_BYTES", 2**18)


@pytest.mark.parametrize("name, case", PAIRS)
def test_each_equals_the_definition(name, case, small_blocks):
    *sizes, kind, dtype, tolerance = CASES[case]
    inputs = noise(*sizes, dtype)
    found = output_and_gradients(partial(IMPLEMENTATIONS[name], **kind), *inputs)
    assert_close(found, definition(*inputs, **kind), tolerance)


def test_cudnn_may_return_nan_gradients_behind_a_length(monkeypatch):
    """In the part of a row that a length cuts off."""
    *sizes, kind, dtype, tolerance = CASES["vision"]
    attend = jax.nn.dot_product_attention

    def leaving_nan(query, key, value, *, key_value_seq_lengths, **options):
        behind = (jnp.arange(key.shape[1]) >= key_value_seq_lengths[:, None])[..., None, None]
        leave = jax.custom_vjp(lambda x, behind: x)
        leave.defvjp(lambda x, behind: (x, behind), lambda behind, gradient: (jnp.where(behind, jnp.nan, gradient), None))
        key, value = leave(key, behind), leave(value, behind)
        return attend(query, key, value, key_value_seq_lengths=key_value_seq_lengths, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", leaving_nan)
    inputs = noise(*sizes, dtype)
    found = output_and_gradients(partial(cudnn, **kind, implementation="xla"), *inputs)
    assert_close(found, definition(*inputs, **kind), tolerance)


@pytest.mark.parametrize("name, key_heads", [("splash", 2), ("splash", 1), ("cudnn", 2), ("blocks", 2)])
def test_in_a_scan_on_a_mesh_each_equals_xla(name, key_heads, small_blocks):
    """Two key heads are split over the tensor axis; one cannot be split."""

    def stack(attend):
        def run(query, key, value, mask_BT):
            def layer(query, _):
                return attend(query, key, value, mask_BT), None

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return run

    inputs, kernel = noise(4, 130, 130, 2, key_heads, 8, "float32"), partial(IMPLEMENTATIONS[name], causal=True)
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        found = output_and_gradients(stack(partial(on_each_device, kernel)), *inputs)
    assert_close(found, output_and_gradients(stack(partial(xla, causal=True)), *inputs), 1e-5)


def test_a_cpu_runs_xla():
    """On a mesh, bit for bit."""
    arrays, mask_BT, cotangent = noise(4, 130, 130, 2, 2, 8, "float32")
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        found, expected = (
            output_and_gradients(partial(attend, causal=True), arrays, mask_BT, cotangent) for attend in (attention, xla)
        )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def tpu_mesh():
    """Eight chips of v5e, for compiling only."""
    pytest.importorskip("libtpu")
    return make_mesh(2, 2, 2, devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)


def lowered_gradient(mesh, B, T, H, K, **kind):
    heads, rows = (NamedSharding(mesh, PartitionSpec(BATCH_AXES, *axes)) for axes in ((None, "tensor"), ()))
    array = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16, sharding=heads)
    mask = jax.ShapeDtypeStruct((B, T), jnp.bool_, sharding=rows)

    def loss(query, key, value, mask):
        return attention(query, key, value, mask, causal=True, **kind).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array, mask)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # which cannot hold programs of absent chips
@pytest.mark.parametrize("kind", [{}, dict(softcap=50.0, window=600)])
def test_a_tpu_holds_no_scores_and_gathers_nothing(tpu_mesh, kind):
    B, T, H, K = 8, 1024, 4, 80
    compiled = lowered_gradient(tpu_mesh, B, T, H, K, **kind).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3  # forward, and two backward
    assert "all-" not in compiled.as_text()
    scores = (B // 4) * (H // 2) * T * T * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


def test_a_tpu_leaves_short_windows_to_xla(tpu_mesh):
    assert "tpu_custom_call" not in lowered_gradient(tpu_mesh, 8, 64, 4, 80).as_text()


# Shapes of queries of configs/7b.py: of a page in a full-attention layer of the vision tower, and of documents.
PAGE, TEXT = (1, 5120, 16, 80), (8, 1408, 28, 128)


@pytest.mark.parametrize(
    "platform, capability, query, key_heads, dtype, kind, expected",
    [
        ("tpu", None, PAGE, 16, "bfloat16", dict(causal=False), "splash"),
        ("tpu", None, (80, 64, 16, 80), 16, "bfloat16", dict(causal=False), "xla"),
        ("cpu", None, PAGE, 16, "bfloat16", dict(causal=False), "xla"),
        ("cuda", None, PAGE, 16, "bfloat16", dict(causal=False), "blocks"),
        ("cuda", (7, 5), PAGE, 16, "bfloat16", dict(causal=False), "blocks"),
        ("cuda", (8, 0), PAGE, 16, "bfloat16", dict(causal=False), "cudnn"),
        ("cuda", (8, 0), PAGE, 16, "float32", dict(causal=False), "blocks"),
        ("cuda", (8, 0), TEXT, 4, "bfloat16", CAUSAL, "cudnn"),
        ("cuda", (8, 0), TEXT, 4, "bfloat16", CAUSAL | dict(window=512), "blocks"),
        ("cuda", (8, 0), TEXT, 4, "bfloat16", CAUSAL | dict(softcap=50.0), "blocks"),
        ("cuda", (8, 0), (8, 1024, 8, 256), 1, "bfloat16", dict(causal=False), "blocks"),
        ("cuda", (9, 0), (8, 1024, 8, 256), 1, "bfloat16", dict(causal=False), "cudnn"),
        ("cuda", (9, 0), (8, 64, 16, 80), 16, "bfloat16", dict(causal=False), "xla"),
        ("cuda", (9, 0), (1, 200, 4, 64), 4, "float32", CAUSAL, "xla"),
    ],
)
def test_each_platform_gets_its_implementation(platform, capability, query, key_heads, dtype, kind, expected, monkeypatch):
    monkeypatch.setattr(module, "cuda_capability", lambda: capability)
    B, T, _, K = query
    assert attention_implementation(platform, query, (B, T, key_heads, K), dtype, **kind) == expected


def lowered_for_cuda(attend, query_shape, key_heads, dtype):
    """The lowered program of output and gradients."""
    B, T, _, K = query_shape
    query, key = jax.ShapeDtypeStruct(query_shape, dtype), jax.ShapeDtypeStruct((B, T, key_heads, K), dtype)

    def run(query, key, value, mask_BT):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, mask_BT), query, key, value)
        return output, pull(output)

    traced = jax.jit(run).trace(query, key, key, jax.ShapeDtypeStruct((B, T), bool))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def largest(text):
    """The number of elements of the largest array of a program."""
    return max(math.prod(map(int, sizes.split("x")[:-1])) for sizes in re.findall(r"tensor<((?:\d+x)+)", text))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [dict(causal=False), CAUSAL | dict(softcap=50.0, window=600)])
def test_blocks_hold_the_scores_of_one_block(dtype, kind):
    text = lowered_for_cuda(partial(in_blocks, **kind), PAGE, 16, dtype)
    assert largest(text) <= attention_xla.SCORE_BYTES / 4 < math.prod(PAGE[:3]) * PAGE[1] / 10


@pytest.mark.parametrize("query_shape, key_heads, kind", [(PAGE, 16, dict(causal=False)), (TEXT, 4, CAUSAL)])
def test_cuda_runs_cudnn_forward_and_backward(query_shape, key_heads, kind, monkeypatch):
    """With a card's capability and cuDNN's version substituted."""
    monkeypatch.setattr(module, "cuda_capability", lambda: (8, 0))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 90800)
    text, kernel = (lowered_for_cuda(partial(f, **kind), query_shape, key_heads, "bfloat16") for f in (attention, cudnn))
    assert text.count("custom_call @__cudnn$fmha") == kernel.count("custom_call @__cudnn$fmha") == 2
    assert largest(kernel) <= math.prod(query_shape)
