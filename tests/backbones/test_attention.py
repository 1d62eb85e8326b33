"""The TPU's kernel, run by Pallas' interpreter, against XLA's attention; and which of the two a program gets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from metaembed_jax.backbones.attention import _splash, _xla, attention
from metaembed_jax.sharding import BATCH_AXES, make_mesh

CAUSAL = dict(causal=True)
CASES = {  # B, S, T, H, G, K, kind, dtype, tolerance
    "grouped": (3, 600, 600, 4, 2, 64, CAUSAL, "float32", 1e-5),
    "bfloat16": (3, 600, 600, 4, 2, 64, CAUSAL, "bfloat16", 2e-2),
    "keep": (3, 16, 600, 4, 1, 128, CAUSAL, "float32", 1e-5),
    "vision": (3, 200, 200, 2, 2, 80, dict(causal=False), "float32", 1e-5),
    "capped": (3, 200, 200, 4, 2, 72, dict(causal=False, scale=0.3, softcap=1.5), "float32", 1e-5),
    "window": (3, 300, 300, 4, 2, 64, CAUSAL | dict(window=40), "float32", 1e-5),
    "keep_capped_window": (3, 80, 600, 4, 1, 64, CAUSAL | dict(scale=0.3, softcap=1.5, window=100), "float32", 1e-5),
}


def noise(B, S, T, H, G, K, dtype):
    """Queries, keys and values; a mask with more and more left padding, up to all; and a cotangent that reads no padding."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K))
    )
    mask_BT = np.arange(T) >= np.linspace(0, T, B)[:, None]
    return (query, key, value), mask_BT, cotangent * mask_BT[:, -S:, None, None].astype(dtype)


def output_and_gradients(attend, arrays, mask_BT, cotangent):
    """What is read of them, float32."""

    def run(arrays, mask_BT, cotangent):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, mask_BT), *arrays)
        return output * (cotangent != 0), *pull(cotangent)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays, mask_BT, cotangent)]


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_xla(case):
    *sizes, kind, dtype, tolerance = CASES[case]
    inputs = noise(*sizes, dtype)
    found = output_and_gradients(partial(_splash, **kind, interpret=True), *inputs)
    assert_close(found, output_and_gradients(partial(_xla, **kind), *inputs), tolerance)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_splash_in_a_scan_on_a_mesh_equals_xla(key_heads):
    """Two key heads are split over the tensor axis, one cannot be."""

    def stack(attend):
        def run(query, key, value, mask_BT):
            def layer(query, _):
                return attend(query, key, value, mask_BT, causal=True), None

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return run

    inputs = noise(4, 130, 130, 2, key_heads, 8, "float32")
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        found = output_and_gradients(stack(partial(_splash, interpret=True)), *inputs)
    assert_close(found, output_and_gradients(stack(_xla), *inputs), 1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_capped_scores(window):
    """Row by row from the definition, where a query sees a key at all."""
    B, S, T, H, G, K = 2, 5, 9, 6, 2, 4
    (query, key, value), mask_BT, _ = noise(B, S, T, H, G, K, "float32")
    mask_BT = mask_BT | (np.arange(T) >= T - S)
    found = attention(query, key, value, mask_BT, causal=True, scale=0.7, softcap=1.2, window=window)
    for b, s, h in np.ndindex(B, S, H):
        last = T - S + s
        seen = [t for t in range(last + 1) if mask_BT[b, t] and (window is None or t > last - window)]
        scores = np.array([1.2 * np.tanh(0.7 * np.dot(query[b, s, h], key[b, t, h // 3]) / 1.2) for t in seen])
        expected = np.exp(scores) @ np.array([value[b, t, h // 3] for t in seen]) / np.exp(scores).sum()
        np.testing.assert_allclose(found[b, s, h], expected, rtol=0, atol=1e-5)


def test_a_cpu_runs_what_it_ran():
    """To the bit, on a mesh too."""
    arrays, mask_BT, cotangent = noise(4, 130, 130, 2, 2, 8, "float32")
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        found, expected = (
            output_and_gradients(partial(attend, causal=True), arrays, mask_BT, cotangent) for attend in (attention, _xla)
        )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def tpu_mesh():
    """Eight chips of v5e that are not there."""
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
