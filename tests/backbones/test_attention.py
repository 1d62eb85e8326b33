"""Every implementation of attention, as a CPU can run it, against the definition; and the one that each program gets."""

import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from metaembed_jax.backbones import attention_splash, attention_xla
from metaembed_jax.backbones.attention import attention, attention_implementation, on_each_device
from metaembed_jax.backbones.attention_flash import flash
from metaembed_jax.backbones.attention_splash import splash
from metaembed_jax.backbones.attention_xla import in_blocks, xla
from metaembed_jax.check import references
from metaembed_jax.mesh import make_mesh
from metaembed_jax.sharding import BATCH_AXES, MESH_AXES

CAUSAL, FULL = dict(causal=True), dict(causal=False)
CASES = {  # B, S, T, H, G, K, kind, dtype, tolerance
    "grouped": (3, 520, 520, 4, 2, 32, CAUSAL, "float32", 1e-5),
    "bfloat16": (3, 200, 200, 4, 2, 64, CAUSAL, "bfloat16", 2e-2),
    "vision": (3, 200, 200, 2, 2, 80, FULL, "float32", 1e-5),
    "crossed": (3, 133, 200, 14, 2, 81, FULL | dict(scale=0.1), "float32", 1e-5),
    "capped": (3, 200, 200, 4, 2, 72, FULL | dict(scale=0.3, softcap=1.5), "float32", 1e-5),
    "window": (3, 300, 300, 4, 2, 64, CAUSAL | dict(window=40), "float32", 1e-5),
    "capped_window": (3, 200, 200, 4, 1, 64, CAUSAL | dict(scale=0.3, softcap=1.5, window=60), "float32", 1e-5),
}
IMPLEMENTATIONS = {
    "splash": partial(splash, interpret=True),
    "flash": partial(flash, interpret=True),
    "blocks": in_blocks,
    "xla": xla,
}


def segments(length, *shares):
    """Rows that hold as many shares of a length as each says, with padding behind."""
    rows = np.zeros((len(shares), length), np.int32)
    for row, parts in zip(rows, shares, strict=True):
        start = 0
        for number, part in enumerate(parts, 1):
            stop = start + round(length * part)
            row[start:stop] = number
            start = stop
    return rows


# Four items and padding, of which one crosses a splash block; an item of one token and a large one; padding alone; one item.
SHARES = ((0.05, 0.4, 0.3, 0.15), (0.005, 0.995), (), (1.0,))


def noise(B, S, T, H, G, K, dtype, in_order=True):
    """Random queries, keys and values, their segments, and a cotangent that is 0 where a query sees nothing, and in padding.

    Where queries are others than keys, the segments of keys are others too: some are missing, and some keys are padding. Not in
    order, the first row's items have numbers that do not rise, and those of the second take turns.
    """
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K))
    )
    query_segments, key_segments = segments(S, *SHARES[:B]), segments(T, *SHARES[:B])
    if not in_order:
        for rows in (query_segments, key_segments):
            rows[0], rows[1] = np.array([0, 3, 1, 4, 2])[rows[0]], 1 + np.arange(rows.shape[1]) % 2
    if S != T:
        key_segments[0][key_segments[0] == 2] = 3
        key_segments[1, ::3] = 0
    is_read = (query_segments > 0) & (query_segments[:, :, None] == key_segments[:, None]).any(2)
    return (query, key, value), (query_segments, key_segments), cotangent * is_read[..., None, None].astype(dtype)


def output_and_gradients(attend, arrays, segments, cotangent):
    """Run attention and its backward pass; return all of the output, it where the cotangent reads it, and the gradients."""

    def run(arrays, segments, cotangent):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, *segments), *arrays)
        return output, output * (cotangent != 0), *pull(cotangent)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(arrays, segments, cotangent)]


def assert_close(outputs, expected, tolerance):
    """All are finite, also where nothing reads them, and those that are read are as expected."""
    assert all(np.isfinite(ours).all() for ours in outputs)
    for ours, theirs in zip(outputs[-4:], expected[-4:], strict=True):
        assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def visible(query_segments, key_segments, positions_BS, *, causal, window=None, **_):
    """The keys that each query may see."""
    mask_BST = query_segments[:, :, None] == key_segments[:, None]
    if causal:
        behind_BST = positions_BS[..., None] - np.arange(key_segments.shape[1])
        mask_BST &= (behind_BST >= 0) & (behind_BST < (window or np.inf))
    return mask_BST


def definition(arrays, segments, cotangent, **kind):
    """The output where the cotangent reads it, and the gradients, in float64."""
    positions_BS = np.broadcast_to(np.arange(segments[0].shape[1]), segments[0].shape)
    mask_BST = visible(*segments, positions_BS, **kind)
    output, *gradients = references.attention(*arrays, mask_BST, cotangent, kind.get("scale"), kind.get("softcap"))
    return output * (np.asarray(cotangent) != 0), *gradients


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few queries."""
    monkeypatch.setattr(attention_xla, "SCORE_BYTES", 2**18)


@pytest.mark.parametrize("case", CASES)
def test_each_equals_the_definition(case, small_blocks):
    *sizes, kind, dtype, tolerance = CASES[case]
    inputs = noise(*sizes, dtype)
    expected = definition(*inputs, **kind)
    is_plain = case in ("grouped", "bfloat16", "vision")
    for name, implementation in IMPLEMENTATIONS.items():
        if name != "flash" or is_plain:
            assert_close(output_and_gradients(partial(implementation, **kind), *inputs), expected, tolerance)


@pytest.mark.parametrize(
    "S, T, kind", [(500, 500, CAUSAL), (500, 500, CAUSAL | dict(window=150)), (500, 500, FULL), (250, 500, FULL), (500, 250, FULL)]
)
def test_splash_in_several_blocks_equals_the_definition(S, T, kind, monkeypatch):
    """Also where it skips some of them."""
    monkeypatch.setattr(attention_splash, "LARGEST_BLOCK", 128)
    inputs = noise(4, S, T, 4, 2, 16, "float32", in_order=False)
    outputs = output_and_gradients(partial(IMPLEMENTATIONS["splash"], **kind), *inputs)
    assert_close(outputs, definition(*inputs, **kind), 1e-5)


# Four blocks of queries and of keys, of which each item has two; or in turns; or one, none and the other.
ROWS = {"items": [1, 1, 2, 2], "descending": [2, 2, 1, 1], "padded": [1, 0, 0, 2], "padding": [0, 0, 0, 0], "one": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    "mask, row, forward, backward",
    [
        (CausalMask, "one", 10, 10),
        (CausalMask, "items", 6, 6),
        (CausalMask, "descending", 6, 6),
        (CausalMask, "padded", 4, 2),  # queries of padding take a block each, for results that are finite
        (FullMask, "one", 16, 16),
        (FullMask, "items", 8, 8),
        (FullMask, "padding", 4, 0),
    ],
)
def test_splash_skips_blocks_that_share_no_segment(mask, row, forward, backward):
    sizes = BlockSizes(**dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 128))
    kernel = make_splash_mha(MultiHeadMask([mask((512, 512))]), block_sizes=sizes, head_shards=1, q_seq_shards=1)
    segments = jnp.repeat(jnp.array(ROWS[row]), 128)
    needed = attention_splash.needed_blocks(kernel, SegmentIds(segments, segments))
    assert [np.count_nonzero(info.block_mask) for info in (needed.fwd_mask_info, needed.dkv_mask_info)] == [forward, backward]


def test_a_skipped_step_of_splash_fetches_the_block_of_the_next_step_that_runs():
    """Behind the last, it keeps that one."""
    runs, blocks = jnp.array([0, 1, 0, 0, 1, 0], bool), jnp.array([0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(attention_splash.upcoming(runs, blocks), [1, 1, 4, 4, 4, 4])


@pytest.mark.parametrize("kind", [CAUSAL, CAUSAL | dict(window=40), CAUSAL | dict(scale=0.3, softcap=1.5)])
def test_queries_at_positions_see_what_those_of_all_positions_see(kind):
    """Queries as vectors are read: some of each segment; 0 after the last."""
    (query, key, value), (query_segments, key_segments), _ = noise(4, 200, 200, 4, 2, 32, "float32")
    reads = [np.sort(np.random.default_rng(b).choice(max((row > 0).sum(), 1), 30)) for b, row in enumerate(query_segments)]
    positions_BV = np.stack([np.where(np.arange(30) < 25, row, 0) for row in reads])
    rows = np.arange(4)[:, None]
    arrays = jnp.asarray(np.asarray(query)[rows, positions_BV]), key, value
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    pair = query_segments[rows, positions_BV], key_segments
    expected = references.attention(
        *arrays, visible(*pair, positions_BV, **kind), cotangent, kind.get("scale"), kind.get("softcap")
    )
    outputs = output_and_gradients(partial(attention, positions_BS=positions_BV, **kind), arrays, pair[1:], cotangent)
    assert_close(outputs, expected, 1e-5)


@pytest.mark.parametrize("name, key_heads", [("splash", 2), ("splash", 1), ("flash", 2), ("flash", 1), ("blocks", 2)])
def test_in_a_scan_on_a_mesh_each_equals_xla(name, key_heads, small_blocks):
    """Two key heads are split over the tensor axis; one cannot be split."""

    def stack(attend):
        def run(query, key, value, *segments):
            def layer(query, _):
                return attend(query, key, value, *segments), None

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=2)[0]

        return run

    inputs, kernel = noise(4, 130, 130, 2, key_heads, 8, "float32"), partial(IMPLEMENTATIONS[name], causal=True)
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        outputs = output_and_gradients(stack(partial(on_each_device, kernel)), *inputs)
    assert_close(outputs, output_and_gradients(stack(partial(xla, causal=True)), *inputs), 1e-5)


def self_attention(query, key, value, segments, _, **kind):
    return attention(query, key, value, segments, **kind)


def cross_attention(query, key, value, query_segments, key_segments, **kind):
    return attention(query, key, value, key_segments, query_segments_BS=query_segments, **kind)


@pytest.mark.parametrize("attend, case", [(self_attention, "grouped"), (cross_attention, "crossed")])
def test_each_query_has_the_segment_it_is_given(attend, case):
    *sizes, kind, dtype, tolerance = CASES[case]
    inputs = noise(*sizes, dtype)
    assert_close(output_and_gradients(partial(attend, **kind), *inputs), definition(*inputs, **kind), tolerance)


def test_a_cpu_runs_xla():
    """Equal bits on a mesh."""
    inputs = noise(4, 130, 130, 2, 2, 8, "float32")
    with jax.set_mesh(make_mesh(2, 2, 2, devices=jax.devices()[:8])):
        outputs, expected = (output_and_gradients(partial(attend, causal=True), *inputs) for attend in (self_attention, xla))
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def tpu_mesh():
    """Eight chips of v5e, for compiling only."""
    pytest.importorskip("libtpu")
    return make_mesh(2, 2, 2, devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)


def lowered_gradient(mesh, B, T, H, K, **kind):
    heads, rows = (NamedSharding(mesh, PartitionSpec(BATCH_AXES, *axes)) for axes in ((None, "tensor"), ()))
    array = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16, sharding=heads)
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)

    def loss(query, key, value, segments):
        return attention(query, key, value, segments, causal=True, **kind).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array, segments)


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


# Queries of configs/7b.py: a row of patches in a full-attention layer of the vision tower, and rows of documents.
PAGE, TEXT = (1, 5120, 16, 80), (8, 1408, 28, 128)


@pytest.mark.parametrize(
    "platform, query, key_heads, dtype, is_plain, expected",
    [
        ("tpu", PAGE, 16, "bfloat16", True, "splash"),
        ("tpu", (80, 64, 16, 80), 16, "bfloat16", True, "xla"),
        ("cpu", PAGE, 16, "bfloat16", True, "xla"),
        ("cuda", PAGE, 16, "bfloat16", True, "flash"),
        ("cuda", PAGE, 16, "bfloat16", False, "blocks"),
        ("cuda", (8, 1408, 8, 256), 1, "bfloat16", True, "blocks"),
        ("cuda", TEXT, 4, "float32", True, "blocks"),
        ("cuda", TEXT, 4, "float64", True, "xla"),
        ("cuda", (8, 64, 16, 80), 16, "bfloat16", True, "xla"),
        ("cuda", (1, 200, 4, 64), 4, "float32", True, "xla"),
    ],
)
def test_each_platform_gets_its_implementation(platform, query, key_heads, dtype, is_plain, expected):
    B, T, _, K = query
    assert attention_implementation(platform, query, (B, T, key_heads, K), dtype, is_plain) == expected


@pytest.mark.parametrize("capability, expected", [("7.5", "blocks"), ("8.0", "flash"), ("12.0", "flash")])
def test_a_card_whose_triton_has_no_bfloat16_runs_blocks(capability, expected, monkeypatch):
    card = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert attention_implementation("cuda", PAGE, PAGE, "bfloat16", True) == expected


# From jax 0.11 on, a Triton kernel is lowered for a card: that of the mesh, if this machine has none.
H100 = AbstractMesh((1, 1, 1), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))


def lowered_for_cuda(attend, query_shape, key_heads, dtype):
    """The lowered program of output and gradients."""
    B, T, _, K = query_shape
    query, key = jax.ShapeDtypeStruct(query_shape, dtype), jax.ShapeDtypeStruct((B, T, key_heads, K), dtype)

    def run(query, key, value, segments_BT):
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, segments_BT, segments_BT), query, key, value)
        return output, pull(output)

    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(run).trace(query, key, key, jax.ShapeDtypeStruct((B, T), jnp.int32))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def largest(text):
    """The number of elements of the largest array of a program."""
    return max(math.prod(map(int, sizes.split("x")[:-1])) for sizes in re.findall(r"tensor<((?:\d+x)+)", text))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [FULL, CAUSAL | dict(softcap=50.0, window=600)])
def test_blocks_hold_the_scores_of_one_block(dtype, kind):
    text = lowered_for_cuda(partial(in_blocks, **kind), PAGE, 16, dtype)
    assert largest(text) <= attention_xla.SCORE_BYTES / 4 < math.prod(PAGE[:3]) * PAGE[1] / 10


@pytest.mark.parametrize(
    "attend, kind, kernels, loops",
    [
        (self_attention, FULL, 3, 0),
        (self_attention, CAUSAL | dict(scale=0.1), 3, 0),
        (self_attention, CAUSAL | dict(window=600), 0, 2),
        (cross_attention, FULL, 0, 2),
    ],
)
def test_cuda_runs_the_kernel_where_it_applies(attend, kind, kernels, loops):
    """One forward and two backward; blocks are a loop forward and one backward."""
    text = lowered_for_cuda(partial(attend, **kind), PAGE, 16, "bfloat16")
    assert (text.count("xla.gpu.triton"), text.count("stablehlo.while")) == (kernels, loops)
