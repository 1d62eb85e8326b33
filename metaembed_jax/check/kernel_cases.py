"""Cases without a network: linear maps, attention, MaxSim and the loss, in both dtypes, against float64 NumPy.

Inputs are a few base rows, repeated until the devices are busy. The reference is computed for the base rows, and every repetition
on every device is compared with it.

B batch, S queries, T keys, H heads, G key heads, K head width; Q queries, N documents, R vectors of an item, D their width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaembed_jax.backbones.attention import attention, attention_implementation
from metaembed_jax.backbones.attention_windows import window_attention
from metaembed_jax.backbones.layers import Linear, inverse_frequencies
from metaembed_jax.backbones.llama_vision import vision
from metaembed_jax.check import loss_reference, references
from metaembed_jax.check.case import SHORT, Case
from metaembed_jax.late_interaction import matryoshka, maxsim
from metaembed_jax.late_interaction.groups import GROUPS
from metaembed_jax.precision import float32_products
from metaembed_jax.sharding import MESH_AXES

# float32: a few times the rounding error of sums of this length, far below that of products in TF32 (5e-4) or bfloat16 (4e-3).
# bfloat16: outputs and softmax weights are rounded to 8 bits; a wrong mask makes an error of a tenth or more.
ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
LINEAR_TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}
MAXSIM_TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-5}  # inputs are exact and sums float32, which some units truncate
LOSS_TOLERANCE = 5e-5  # in any dtype: similarities are float32, and logits are scores / 0.03
LOSS_GRADIENT_TOLERANCE = {"float32": 5e-5, "bfloat16": 3e-2}  # gradients of bfloat16 vectors are bfloat16


class Sizes(NamedTuple):
    """The sizes of the cases.

    Attributes:
      rows, window_rows: rows of attention on each device, an even number; a row of `window_rows` is one slot of windows.
      length: keys of attention.
      linear: rows on each device, inputs, outputs.
      documents: documents of MaxSim, over all devices.
      pairs: pairs of the loss, over all devices.
    """

    rows: int
    window_rows: int
    length: int
    linear: tuple[int, int, int]
    documents: int
    pairs: int


CPU = Sizes(2, 2, 200, (64, 96, 160), 64, 8)
CHIP = Sizes(8, 128, 1024, (8192, 4096, 4096), 16384, 128)


class AttentionKind(NamedTuple):
    """Attention as a family uses it.

    Attributes:
      heads, key_heads, width: H, G, K.
      read_positions: number of positions that have queries; 0 for all.
      cross_queries: number of queries of cross-attention, with one item without keys; 0 for self-attention.
      slot: patches in a slot of windows; 0 for no windows.
      window, scale, softcap: as in `attention`.
      around_padding: all pairs attend, except a padding query and a padding key.
    """

    name: str
    heads: int
    key_heads: int
    width: int
    causal: bool = True
    read_positions: int = 0
    cross_queries: int = 0
    slot: int = 0
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    around_padding: bool = False


ATTENTION = (
    AttentionKind("full 80", 4, 4, 80, causal=False),  # vision of Qwen2.5-VL
    AttentionKind("full 72", 4, 4, 72, causal=False),  # SigLIP: PaliGemma
    AttentionKind("full 64", 4, 4, 64, causal=False),  # SmolVLM, Qwen3-VL
    AttentionKind("windows of 64", 16, 16, 80, causal=False, slot=64),  # Qwen2.5-VL, with the rotation
    AttentionKind("around padding", 4, 4, 80, causal=False, around_padding=True),  # Llama 3.2 Vision
    AttentionKind("cross", 4, 1, 128, causal=False, cross_queries=96),  # Llama 3.2 Vision
    AttentionKind("causal 128", 8, 2, 128),  # Qwen, Llama
    AttentionKind("causal 64", 6, 2, 64),  # SmolVLM
    AttentionKind("causal at 80", 8, 1, 64, read_positions=80),  # PaliGemma
    AttentionKind(
        "prefix capped", 4, 2, 64, causal=False, scale=0.3, softcap=2.0
    ),  # PaliGemma 2; random scores never reach its cap of 50
    AttentionKind("local capped", 4, 2, 64, window=100, scale=0.3, softcap=2.0),  # PaliGemma 2
)


def kernel_cases(mesh: Mesh, sizes: Sizes) -> Iterator[Case]:
    """Yield all cases, on a mesh whose only axis above 1 is `data`."""
    for dtype in SHORT:
        yield linear_case(mesh, sizes, dtype)
    for kind in ATTENTION:
        for dtype in SHORT:
            yield attention_case(mesh, sizes, kind, dtype)
    for name in ("f32", "bf16", "f32 masked", "bf16 masked", "int8"):
        yield maxsim_case(mesh, sizes, name)
    for dtype in SHORT:
        yield loss_case(mesh, sizes, dtype)


def linear_case(mesh: Mesh, sizes: Sizes, dtype: str) -> Case:
    """Return the case of a linear map and its gradients, as layers compute them."""
    rows, inputs, outputs = sizes.linear
    base, repeats = min(rows, 256), max(rows // 256, 1) * mesh.size
    graph, _ = nnx.split(nnx.eval_shape(lambda: Linear(inputs, outputs, axes=(None, None), bias=False, rngs=nnx.Rngs(0))))
    x, cotangent, kernel = noise((base, inputs), (base, outputs), (inputs, outputs))

    def arguments():
        split, whole = PartitionSpec(MESH_AXES), PartitionSpec()
        return (
            *(put(array.astype(jnp.dtype(dtype)), mesh, split, repeats) for array in (x, cotangent)),
            put(kernel, mesh, whole),
        )

    def function(x, cotangent, kernel):
        with float32_products(dtype):  # as in the network
            y, pull = jax.vjp(lambda x, kernel: nnx.merge(graph, {"kernel": kernel})(x), x, kernel)
            return dict(zip(("output", "d input", "d kernel"), (y, *pull(cotangent)), strict=True))

    def reference():
        # The kernel is used in the dtype of x.
        y, dx, dkernel = references.linear(*(rounded(array, dtype) for array in (x, kernel, cotangent)))
        return {"output": y, "d input": dx, "d kernel": repeats * dkernel}

    products = base * repeats * inputs * outputs
    moved = (2 * base * repeats * (inputs + outputs)) * itemsize(dtype) + 3 * 4 * inputs * outputs
    return Case(
        f"linear {SHORT[dtype]}",
        jax.jit(function),
        arguments,
        reference,
        LINEAR_TOLERANCE[dtype],
        6.0 * products,
        moved,
        dtype=dtype,
    )


def attention_case(mesh: Mesh, sizes: Sizes, kind: AttentionKind, dtype: str) -> Case:
    """Return the case of attention and its gradients, in a row of one item and a row of three items and padding."""
    T = kind.slot or sizes.length
    S, H, G, K = kind.read_positions or kind.cross_queries or T, kind.heads, kind.key_heads, kind.width
    repeats = (sizes.window_rows if kind.slot else sizes.rows) // 2 * mesh.size
    query, key, value, cotangent = noise((2, S, H, K), (2, T, G, K), (2, T, G, K), (2, S, H, K))
    rows, mask_BST = packed_rows(kind, S, T)
    sees_BS = np.asarray(mask_BST.any(2))
    cotangent = cotangent * sees_BS[..., None, None]  # the output of a query without keys is not read

    def arguments():
        split = PartitionSpec(MESH_AXES)
        arrays = (array.astype(jnp.dtype(dtype)) for array in (query, key, value, cotangent))
        return tuple(put(array, mesh, split, repeats) for array in (*arrays, *rows, sees_BS))

    def function(query, key, value, cotangent, query_segments, key_segments, positions, sees):
        def attend(query, key, value):
            return attend_as(kind, query, key, value, query_segments, key_segments, positions)

        with float32_products(dtype):  # as in the network
            output, pull = jax.vjp(attend, query, key, value)
            gradients = pull(cotangent)
        output = jnp.where(sees[..., None, None], output, 0)
        return dict(zip(("output", "d query", "d key", "d value"), (output, *gradients), strict=True))

    def reference():
        query32, key32, value32 = (rounded(array, dtype) for array in (query, key, value))
        cos, sin = jax.device_get(angles(rows[2], K)) if kind.slot else (np.ones((2, S, K)), np.zeros((2, S, K)))
        if kind.slot:
            query32, key32 = (references.rotated(array, cos, sin) for array in (query32, key32))
        output, d_query, d_key, d_value = references.attention(
            query32, key32, value32, mask_BST, rounded(cotangent, dtype), kind.scale, kind.softcap
        )
        if kind.slot:
            d_query, d_key = (references.rotated(array, cos, -sin) for array in (d_query, d_key))
        return {"output": output, "d query": d_query, "d key": d_key, "d value": d_value}

    platform = mesh.devices.flat[0].platform.replace("gpu", "cuda")
    query_shape, key_shape = ((2 * repeats, length, heads, K + kind.around_padding) for length, heads in ((S, H), (T, G)))
    is_plain = not kind.cross_queries and kind.softcap is None and kind.window is None
    implementation = "xla"
    if not kind.read_positions:
        implementation = attention_implementation(platform, query_shape, key_shape, jnp.dtype(dtype), is_plain)
    return Case(
        f"attention {kind.name} {SHORT[dtype]}",
        jax.jit(function),
        arguments,
        reference,
        ATTENTION_TOLERANCE[dtype],
        12.0 * mask_BST.sum() * repeats * H * K,
        6 * itemsize(dtype) * (query.size + key.size) * repeats,
        dtype=dtype,
        implementation="" if kind.slot else implementation,
    )


def packed_rows(kind: AttentionKind, S: int, T: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return (segments of queries [2, S], segments of keys [2, T], positions of queries [2, S]), and the mask [2, S, T]."""
    key_segments = packed_segments(T)
    positions = np.tile(np.linspace(0, T - 1, S).astype(np.int32) if kind.read_positions else np.arange(S, dtype=np.int32), (2, 1))
    if kind.cross_queries:
        query_segments = packed_segments(S)
        key_segments = np.where(key_segments == 2, 0, key_segments)
    else:
        query_segments = np.take_along_axis(key_segments, positions, axis=1)
    if kind.around_padding:
        mask_BST = (query_segments > 0)[:, :, None] | (key_segments > 0)[:, None]
    else:
        mask_BST = (query_segments[:, :, None] == key_segments[:, None]) & (query_segments > 0)[:, :, None]
        mask_BST &= references.visible(positions, T, kind.causal, kind.window)
    return (query_segments, key_segments, positions), mask_BST


def packed_segments(length: int) -> np.ndarray:
    """Return the segments of a row of one item, and of a row of three items and a third of padding."""
    positions = np.arange(length)
    ends = length // 3, length // 2, length - length // 3
    items = 1 + sum((positions >= end).astype(np.int32) for end in ends[:2])
    return np.stack([np.ones(length, np.int32), np.where(positions < ends[2], items, 0)])


def attend_as(kind: AttentionKind, query, key, value, query_segments, key_segments, positions) -> jax.Array:
    """Compute attention with the function that the families of this kind call."""
    if kind.around_padding:
        return vision.attend_around_padding(query, key, value, query_segments == 0)
    if kind.slot:
        cos, sin = angles(positions, kind.width)
        flat_query, flat_key, flat_value = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        windows = query_segments - 1
        output = window_attention(flat_query, flat_key, flat_value, cos, sin, windows, heads=kind.heads, window=kind.slot)
        return output.reshape(query.shape)
    return attention(
        query,
        key,
        value,
        key_segments,
        causal=kind.causal,
        query_segments_BS=query_segments if kind.cross_queries else None,
        positions_BS=positions if kind.read_positions else None,
        scale=kind.scale,
        softcap=kind.softcap,
        window=kind.window,
    )


def angles(positions, width: int) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of a rotation by positions."""
    angle = positions[..., None] * inverse_frequencies(width, 10000.0)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def maxsim_case(mesh: Mesh, sizes: Sizes, name: str) -> Case:
    """Return the case of scores: documents are sharded over the devices, and are floats, masked floats, or int8 with scales."""
    queries, (r_q, r_c), width = 32, GROUPS[-1], 128
    base = min(sizes.documents, 64)
    repeats = -(-sizes.documents // base // mesh.size) * mesh.size
    dtype = "bfloat16" if name.startswith("bf16") else "float32"
    query, document = (unit(x) for x in noise((queries, r_q, width), (base, r_c, width)))
    query, document = rounded(query, dtype), rounded(document, dtype)
    mask = scale = None
    stored = document
    if name == "int8":
        stored = np.rint(document * 300).clip(-127, 127).astype(np.int8)
        scale = np.random.default_rng(1).uniform(0.5, 1.5, (base, r_c)).astype(np.float32) / 300
        document = stored * scale[..., None].astype(np.float64)
    if name.endswith("masked"):
        mask = np.arange(r_c) < np.linspace(1, r_c, base).round()[:, None]

    def arguments():
        array = stored if name == "int8" else stored.astype(jnp.dtype(dtype))
        whole, split = PartitionSpec(), PartitionSpec(MESH_AXES)
        optional = (None if x is None else put(x, mesh, split, repeats) for x in (mask, scale))
        return put(query.astype(jnp.dtype(dtype)), mesh, whole), put(array, mesh, split, repeats), *optional

    def function(query, document, mask, scale):
        def score(query, document, mask, scale):
            return maxsim.maxsim(query, document, document_mask=mask, document_scale=scale).T

        split = PartitionSpec(MESH_AXES)
        specs = PartitionSpec(), split, split, split
        sharded = jax.shard_map(score, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return {"scores": sharded(query, document, mask, scale)}

    def reference():
        return {"scores": references.maxsim_scores(query, document, mask).T}

    documents = base * repeats
    moved = stored.astype(np.int8 if name == "int8" else jnp.dtype(dtype)).nbytes * repeats + 4 * queries * documents
    return Case(
        f"maxsim {name}",
        jax.jit(function),
        arguments,
        reference,
        MAXSIM_TOLERANCE[dtype],
        2.0 * queries * r_q * documents * r_c * width,
        moved,
        dtype=dtype,
    )


def loss_case(mesh: Mesh, sizes: Sizes, dtype: str) -> Case:
    """Return the case of the Matryoshka loss and its gradients: one hard negative a pair, and pairs sharded over the devices."""
    pairs, width = -(-sizes.pairs // mesh.size) * mesh.size, 128
    vectors = [rounded(x, dtype) for x in similar_items(pairs, width)]

    def arguments():
        return tuple(put(x.astype(jnp.dtype(dtype)), mesh, PartitionSpec(MESH_AXES[:2])) for x in vectors)

    def function(*vectors):
        def loss(*vectors):
            return matryoshka.matryoshka_loss(*vectors, mesh=mesh)

        (value, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*vectors)
        losses = jnp.stack([metrics[f"loss/{r_q}:{r_c}"] for r_q, r_c in GROUPS])
        return {"loss": value, "losses": losses, "gradient": gradients}

    def reference():
        query, positive, negatives = vectors
        loss, gradients, figures = loss_reference.matryoshka(query, positive, negatives, GROUPS)
        return {"loss": loss, "losses": figures["loss"], "gradient": gradients}

    (r_q, r_c), documents = GROUPS[-1], pairs + 1
    return Case(
        f"loss {SHORT[dtype]}",
        jax.jit(function),
        arguments,
        reference,
        LOSS_TOLERANCE,
        6.0 * pairs * documents * r_q * r_c * width,
        2.0 * sum(x.size for x in vectors) * itemsize(dtype),
        tolerances={"gradient": LOSS_GRADIENT_TOLERANCE[dtype]},
        dtype=dtype,
    )


def similar_items(pairs: int, width: int) -> tuple[np.ndarray, ...]:
    """Return query, positive and hard negative vectors with a loss of order 1, and with every maximum clear of the second best.

    Items are small variations of one set of directions. A document has each query direction four times, with four strengths in
    random order, and they differ by far more than rounding. So every block of the groups has some maxima, and all are clear.
    """
    (r_q, r_c), rng = GROUPS[-1], np.random.default_rng(2)
    directions, other = (unit(rng.normal(size=(count, width))) for count in (r_q, r_c))
    strength = np.argsort(rng.random((r_q, r_c // r_q)), axis=1).T.ravel() * 0.1 + 0.5
    near = unit(strength[:, None] * np.tile(directions, (r_c // r_q, 1)) + (1 - strength[:, None]) * other)
    query = unit(directions + 0.04 * rng.normal(size=(pairs, r_q, width)))
    variation = np.tile(query - directions, (1, r_c // r_q, 1))
    positive = unit(near + 0.06 * variation + 0.01 * rng.normal(size=(pairs, r_c, width)))
    negative = unit(near + 0.01 * rng.normal(size=(pairs, 1, r_c, width)))
    return tuple(x.astype(np.float32) for x in (query, positive, negative))


def noise(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Return arrays of normal float32 numbers, the same on every machine."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def unit(x: np.ndarray) -> np.ndarray:
    """Scale vectors to length one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round numbers to a dtype, and return them in float32."""
    return x.astype(jnp.dtype(dtype)).astype(np.float32)


def itemsize(dtype: str) -> int:
    """Return the bytes of a number."""
    return jnp.dtype(dtype).itemsize


def put(x: np.ndarray, mesh: Mesh, spec: PartitionSpec, repeats: int = 1) -> jax.Array:
    """Put an array on the mesh, and repeat its rows there."""
    whole = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    tile = jax.jit(lambda x: jnp.tile(x, (repeats,) + (1,) * (x.ndim - 1)), out_shardings=NamedSharding(mesh, spec))
    return tile(whole)
