"""Attention. The implementation is chosen for the platform when a program is lowered.

    splash    TPU: JAX's Pallas kernel (`attention_splash`)
    flash     NVIDIA, self-attention in bfloat16 without window or soft cap: JAX's Pallas kernel (`attention_flash`)
    blocks    NVIDIA otherwise: XLA on one block of queries after another (`attention_xla`)
    xla       other platforms; few keys or scores on any platform

`xla` writes the scores of all pairs to memory, [B, H, S, T]; the others hold a block of them at a time, forward and backward.
Temporaries with gradients, as compiled for v5e, 8 causal sequences of 2048, 16 heads of 128: 4128 MiB with XLA, 518 with splash.
On an H200, bfloat16, five items a row, milliseconds with gradients and MiB of temporaries:

    [B, S, H, K], G                     flash         blocks           xla
    [8, 2432, 28, 128], 4, causal    5.6    798    47  1,009    21  15,211
    [8, 4096, 16, 80], 16, full     13.6    164    81  1,123    31  20,482

JAX has no public interface to cuDNN's kernel with segments: `jax.nn.dot_product_attention` takes one length a row, or a mask of all
pairs, with which gradients are NaN on Hopper cards (https://github.com/pytorch/pytorch/issues/196678).

B batch, S queries, T keys, H heads, G key/value heads, K head width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metaembed_jax.backbones.attention_flash import flash, flash_takes, has_card_before_ampere
from metaembed_jax.backbones.attention_splash import SMALLEST_BLOCK, splash
from metaembed_jax.backbones.attention_xla import in_blocks, queries_at_once, xla
from metaembed_jax.sharding import named_sharding

KERNELS = {"splash": splash, "flash": flash, "blocks": in_blocks}
FLASH_OPTIONS = {"causal", "scale"}  # options of the kernel


def attention(
    query_BSHK: Float[Array, "B S H K"],
    key_BTGK: Float[Array, "B T G K"],
    value_BTGK: Float[Array, "B T G K"],
    segments_BT: Int[Array, "B T"],
    *,
    causal: bool,
    query_segments_BS: Int[Array, "B S"] | None = None,
    positions_BS: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B S H K"]:
    """Softmax attention with grouped heads inside segments; the softmax is float32.

    A query sees the keys of its own segment; with `causal`, those up to its own position. The result of a query without a visible
    key is finite. Two segments and padding, which is segment 0:

        segments   1 1 2 2 2 0
        query 1    x x . . . .
        query 3    . . x x . .

    Args:
      segments_BT: segments of the keys.
      query_segments_BS: segments of the queries in cross-attention; None: those of the keys.
      positions_BS: with `causal`, the positions of the queries among the keys; None: 0, 1, 2, ...
      scale: factor of the scores; None: K**-0.5.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv 2408.00118); None: no cap.
      window: with `causal`, the number of keys up to its own position that a query may see; None: all.
    """
    kind = dict(causal=causal, scale=scale, softcap=softcap, window=window)
    arrays = query_BSHK, key_BTGK, value_BTGK
    if positions_BS is not None:  # few queries, of small models
        segments = jnp.take_along_axis(segments_BT, positions_BS, axis=1), segments_BT
        return xla(*arrays, *segments, **kind, positions_BS=positions_BS)
    options = {name: value for name, value in kind.items() if value is not None}
    is_plain = query_segments_BS is None and options.keys() <= FLASH_OPTIONS
    arrays = *arrays, segments_BT if query_segments_BS is None else query_segments_BS, segments_BT
    kernels = {}
    for platform in ("tpu", "cuda"):
        name = attention_implementation(platform, query_BSHK.shape, key_BTGK.shape, query_BSHK.dtype, is_plain)
        if name != "xla":
            kernels[platform] = partial(on_each_device, partial(KERNELS[name], **options))
    if not kernels:
        return xla(*arrays, **kind)
    return jax.lax.platform_dependent(*arrays, **kernels, default=partial(xla, **kind))


def attention_implementation(platform: str, query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype, is_plain: bool) -> str:
    """Return the implementation of `attention` on a platform: "splash", "flash", "blocks" or "xla".

    Fewer keys than a block of splash use XLA on every platform, because the kernel would pad them. Windows of patches have a
    separate function, `attention_windows.window_attention`.

    Args:
      platform: "tpu", "cuda", "cpu" or "rocm".
      is_plain: True for self-attention without soft cap or window.
    """
    S, T = query_shape[1], key_shape[1]
    if T < SMALLEST_BLOCK or platform not in ("tpu", "cuda") or np.dtype(dtype) == np.float64:  # no kernel takes float64
        return "xla"
    if platform == "tpu":
        return "splash"
    if is_plain and flash_takes(query_shape[3], dtype) and not has_card_before_ampere():
        return "flash"
    return "blocks" if queries_at_once(query_shape, T) < S else "xla"


def on_each_device(kernel: Callable, query_BSHK: Array, key_BTGK: Array, value_BTGK: Array, *segments: Array) -> Array:
    """Run a kernel on each device's own rows and heads. The partitioner cannot split a kernel, and would gather all of them."""
    arrays = query_BSHK, key_BTGK, value_BTGK, *segments
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays)
    # Query heads are sharded as key heads are, because each must be on the device of its key head.
    heads = named_sharding(mesh, ("batch", None, "heads", None), key_BTGK.shape).spec
    rows = named_sharding(mesh, ("batch", None), key_BTGK.shape[:2]).spec
    on_mesh = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False)
    return on_mesh(*arrays)
