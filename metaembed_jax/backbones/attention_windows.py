"""Attention inside windows of patches, with the rotation of queries and keys.

The patches of a row are stored in slots of `window` patches. A slot holds one window, or several smaller windows of one image:

    slot          0                 1                 2
    patches       a a a a a a a a   b b b b c c - -   - - - - - - - -
    windows_BP    0 0 0 0 0 0 0 0   0 0 0 0 1 1 . .   . . . . . . . .      . is -1, padding

A TPU runs our kernel (`attention_windows_tpu`) if windows and heads suit its registers. Other platforms run XLA, which writes
scores and rotated arrays to memory. As compiled, 8 pages of 5120 patches, 16 heads of 80, bfloat16, output and gradients:

           HBM traffic, MiB     temporaries, MiB
           XLA       kernel     XLA       kernel
    v5e    9,585     1,245      1,521     40
    v6e    10,150    1,125      1,466     0

B rows, P patches, D width, H heads, K head width, W patches of a slot, N slots of all rows.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.attention_windows_tpu import TILE, attend, takes
from metaembed_jax.backbones.layers import rotate, split_heads
from metaembed_jax.sharding import named_sharding


def window_attention(
    query_BPD: Float[Array, "B P D"],
    key_BPD: Float[Array, "B P D"],
    value_BPD: Float[Array, "B P D"],
    cos_BPK: Float[Array, "B P K"],
    sin_BPK: Float[Array, "B P K"],
    windows_BP: Int[Array, "B P"],
    *,
    heads: int,
    window: int,
) -> Float[Array, "B P D"]:
    """Softmax attention of each patch to its window. The softmax is float32, its scale K**-0.5. Results of padding are finite.

    Args:
      query_BPD, key_BPD: queries and keys before the rotation.
      cos_BPK, sin_BPK: float32, as for `rotate`; they get no gradients.
      windows_BP: number of the patch's window in its slot; -1: padding.
      window: patches of a slot; divides P.
    """
    arrays = (query_BPD, key_BPD, value_BPD, jax.lax.stop_gradient(cos_BPK), jax.lax.stop_gradient(sin_BPK), windows_BP)
    by_xla = partial(xla, heads=heads, window=window)
    if not takes(heads_on_device(query_BPD.shape, heads), cos_BPK.shape[2], window, query_BPD.dtype):
        return by_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=partial(on_each_device, partial(kernel, window=window), heads), default=by_xla)


def xla(query_BPD, key_BPD, value_BPD, cos_BPK, sin_BPK, windows_BP, *, heads, window):
    """Compute the scores of all slots at once; see `window_attention`."""
    query_BPHK, key_BPHK, value_BPHK = (split_heads(x, heads) for x in (query_BPD, key_BPD, value_BPD))
    rotated = rotate(query_BPHK, cos_BPK, sin_BPK), rotate(key_BPHK, cos_BPK, sin_BPK)
    slots = [x.reshape(-1, window, *x.shape[2:]) for x in (*rotated, value_BPHK)]
    windows_NW = windows_BP.reshape(-1, window)
    visible_N1WW = (windows_NW[:, :, None] == windows_NW[:, None, :])[:, None]
    return jax.nn.dot_product_attention(*slots, mask=visible_N1WW, implementation="xla").reshape(query_BPD.shape)


def kernel(query_BPD, key_BPD, value_BPD, cos_BPK, sin_BPK, windows_BP, *, window, interpret=False):
    """Run the TPU kernel on one device, on the patches of all rows together; see `window_attention`."""
    shape, patches = query_BPD.shape, windows_BP.size
    slots_BP = jnp.arange(patches, dtype=jnp.int32).reshape(windows_BP.shape) // window
    groups_BP = slots_BP * (window + 1) + windows_BP + 1

    def whole_tiles(x_BP):
        x_N = x_BP.reshape(-1, *x_BP.shape[2:])
        return jnp.pad(x_N, [(0, -patches % TILE)] + [(0, 0)] * (x_N.ndim - 1))

    # The padding of the last tile is in group 0, with the padding of the first slot.
    arrays = map(whole_tiles, (query_BPD, key_BPD, value_BPD, cos_BPK, sin_BPK, groups_BP))
    return attend(*arrays, interpret)[:patches].reshape(shape)  # pyright: ignore[reportIndexIssue]  custom_vjp loses the type


def on_each_device(kernel: Callable, heads: int, query_BPD, key_BPD, value_BPD, cos_BPK, sin_BPK, windows_BP) -> Array:
    """Run a kernel on each device's own rows and heads. The partitioner cannot split a kernel, and would gather all of them."""
    arrays, mesh = (query_BPD, key_BPD, value_BPD, cos_BPK, sin_BPK, windows_BP), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays)
    lanes = _head_sharding(mesh, query_BPD.shape, heads).spec
    rows = named_sharding(mesh, ("batch", None), windows_BP.shape).spec
    return jax.shard_map(kernel, in_specs=(lanes, lanes, lanes, rows, rows, rows), out_specs=lanes, check_vma=False)(*arrays)


def heads_on_device(shape: tuple[int, ...], heads: int) -> int:
    """Return the number of heads that each device of the mesh of `jax.set_mesh` holds."""
    mesh = jax.sharding.get_abstract_mesh()
    return heads if mesh.empty else _head_sharding(mesh, shape, heads).shard_shape((*shape[:2], heads))[2]


def _head_sharding(mesh, shape, heads):
    """Return the sharding of [B, P, D] that keeps heads whole; it replicates them if the mesh does not divide their number."""
    return named_sharding(mesh, ("batch", None, "heads"), (*shape[:2], heads))
