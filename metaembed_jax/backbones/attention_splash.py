"""JAX's splash attention on a TPU (`jax.experimental.pallas.ops.tpu.splash_attention`, after arXiv 2205.14135).

The kernel holds one block of scores at a time, forward and backward, and skips those that no query may see.

Letters as in `attention`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array

from metaembed_jax.precision import float32_products

SMALLEST_BLOCK = 128  # a row of a TPU's vector registers; the kernel takes no less
LARGEST_BLOCK = 512  # as MaxText's: the larger, the fewer steps, each with a cost of its own


def splash(
    query_BSHK,
    key_BTGK,
    value_BTGK,
    query_segments_BS,
    key_segments_BT,
    *,
    causal,
    scale=None,
    softcap=None,
    window=None,
    interpret=False,
):
    """Run the kernel on one device; see `attention`."""
    (S, H, K), T = query_BSHK.shape[1:], key_BTGK.shape[1]
    query_block, key_block = _block(S), _block(T)
    scaled_BSHK = (query_BSHK.astype(jnp.float32) * (K**-0.5 if scale is None else scale)).astype(query_BSHK.dtype)
    query_BHSK = jnp.swapaxes(_pad(scaled_BSHK, query_block), 1, 2)
    key_BGTK, value_BGTK = (jnp.swapaxes(_pad(x, key_block), 1, 2) for x in (key_BTGK, value_BTGK))
    segments = SegmentIds(q=_pad(query_segments_BS, query_block), kv=_pad(key_segments_BT, key_block))
    shape = query_BHSK.shape[2], key_BGTK.shape[2]
    if causal:
        mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), offset=0)
    else:
        mask = FullMask(shape)
    blocks = BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
    )
    # Head h reads key head h // (H / G) in place; nothing is repeated.
    kernel = make_splash_mha(
        MultiHeadMask([mask] * H),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    attend = _in_float32(_each_row) if query_BSHK.dtype == jnp.float32 else _each_row
    mixed_BHSK = attend(kernel, query_BHSK, key_BGTK, value_BGTK, segments)
    return jnp.swapaxes(mixed_BHSK, 1, 2)[:, :S]


def _each_row(kernel, *arrays):
    return jax.vmap(kernel)(*arrays)


def _in_float32(function: Callable) -> Callable:
    """Give a function float32 products in its backward pass too, where a `custom_vjp` does not see the caller's context."""

    def in_context(traced: Callable) -> Callable:
        def call(*arrays):
            with float32_products(jnp.float32):
                return traced(*arrays)

        return call

    in_float32 = jax.custom_vjp(in_context(function))
    in_float32.defvjp(in_context(partial(jax.vjp, function)), in_context(lambda pull, cotangent: pull(cotangent)))
    return in_float32


def _block(length: int) -> int:
    """Return the size of the fewest equal blocks that hold a length."""
    blocks = -(-length // LARGEST_BLOCK)
    return SMALLEST_BLOCK * -(-length // (SMALLEST_BLOCK * blocks))


def _pad(x_BS: Array, block: int) -> Array:
    """Pad the second axis with zeros to whole blocks."""
    return jnp.pad(x_BS, [(0, 0), (0, -x_BS.shape[1] % block)] + [(0, 0)] * (x_BS.ndim - 2))
