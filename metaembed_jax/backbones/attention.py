"""Attention by what fits the chip, chosen where a program is lowered.

    splash    TPU: JAX's Pallas kernel (`attention_splash`)
    cudnn     NVIDIA since Ampere: cuDNN's kernel, for bfloat16 and float16 without soft caps and windows (`attention_cudnn`)
    blocks    NVIDIA otherwise: XLA on one block of queries after another (`attention_xla`)
    xla       everywhere else, and where keys or scores are few

XLA alone writes the scores of all pairs to memory, [B, H, S, T]; the others hold a part of them at a time, forward and backward.
Temporaries with gradients, as compiled: 8 causal sequences of 2048, 16 heads of 128, for v5e: 4128 MiB with XLA, 518 with splash;
8 pages of 5120 patches, 16 heads of 80, bfloat16, for an H100: 32,002 MiB with XLA, 1,359 in blocks, 203 with cuDNN.

B batch, S queries, T keys, H heads, G key/value heads, K head width.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from metaembed_jax.backbones.attention_cudnn import cudnn
from metaembed_jax.backbones.attention_splash import SMALLEST_BLOCK, splash
from metaembed_jax.backbones.attention_xla import in_blocks, queries_at_once, xla
from metaembed_jax.sharding import named_sharding

KERNELS = {"splash": splash, "cudnn": cudnn, "blocks": in_blocks}
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


def attention(
    query_BSHK: Float[Array, "B S H K"],
    key_BTGK: Float[Array, "B T G K"],
    value_BTGK: Float[Array, "B T G K"],
    key_mask_BT: Bool[Array, "B T"],
    causal: bool,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B S H K"]:
    """Softmax attention with grouped heads; the softmax is float32. A row that may see nothing returns finite numbers.

    With `causal` the queries are the last S of the T positions. For T = 4, S = 2 and a first key of padding:

        keys     0 1 2 3
        query 2  . x x .
        query 3  . x x x

    Args:
      key_mask_BT: false for keys that nobody may see.
      scale: what scores are multiplied with; None: K**-0.5.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv 2408.00118); None: they stay as they are.
      window: with `causal`, how many keys up to its own a query may see; None: all of them.
    """
    arrays, kind = (query_BSHK, key_BTGK, value_BTGK, key_mask_BT), dict(causal=causal, scale=scale, softcap=softcap, window=window)
    shapes = query_BSHK.shape, key_BTGK.shape, query_BSHK.dtype
    names = {platform: attention_implementation(platform, *shapes, **kind) for platform in ("tpu", "cuda")}
    kernels = {
        platform: partial(on_each_device, partial(KERNELS[name], **kind)) for platform, name in names.items() if name != "xla"
    }
    if not kernels:
        return xla(*arrays, **kind)
    return jax.lax.platform_dependent(*arrays, **kernels, default=partial(xla, **kind))


def attention_implementation(
    platform: str,
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int, int],
    dtype,
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> str:
    """Name the implementation of `attention` that a platform's program gets: "splash", "cudnn", "blocks" or "xla".

    For "cuda" it depends on this machine's card. Without one, a program for CUDA gets no cuDNN, which JAX refuses to trace.

    Fewer keys than a block of splash (a vision window has 64) go to XLA everywhere: the kernel would fill them up, and compute four
    scores for each. Compiled for v5e, 320 windows, 16 heads of 80, with gradients: 560 MiB of temporaries with XLA, 1362 MiB with
    splash, and still 644 MiB if windows shared blocks.

    Args:
      platform: "tpu", "cuda", "cpu" or "rocm".
    """
    (S, _, K), T = query_shape[1:], key_shape[1]
    if T < SMALLEST_BLOCK or platform not in ("tpu", "cuda") or np.dtype(dtype) == np.float64:  # which no kernel takes
        return "xla"
    if platform == "tpu":
        return "splash"
    capability = cuda_capability()
    if capability is not None and capability >= AMPERE and np.dtype(dtype).itemsize == 2:
        # cuDNN counts a causal mask from the first query, and its soft cap is not in JAX's interface.
        if softcap is None and window is None and (not causal or S == T) and K <= (256 if capability >= HOPPER else 128):
            return "cudnn"
    return "blocks" if queries_at_once(query_shape, T) < S else "xla"


def cuda_capability() -> tuple[int, int] | None:
    """Return the compute capability of this machine's NVIDIA card, say (9, 0); None without one."""
    device = jax.local_devices()[0]
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", ""))) if device.platform == "gpu" else None
    return numbers and (int(numbers[1]), int(numbers[2]))


def on_each_device(kernel: Callable, query_BSHK: Array, key_BTGK: Array, value_BTGK: Array, key_mask_BT: Array) -> Array:
    """Run a kernel on each device's rows and heads, which the partitioner, blind to what is in a kernel, would gather."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query_BSHK, key_BTGK, value_BTGK, key_mask_BT)
    # Where the key heads do not split, neither do the query heads: each must be on its own head's device.
    heads = named_sharding(mesh, ("batch", None, "heads", None), key_BTGK.shape).spec
    rows = named_sharding(mesh, ("batch", None), key_mask_BT.shape).spec
    on_mesh = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return on_mesh(query_BSHK, key_BTGK, value_BTGK, key_mask_BT)
