"""JAX's splash attention on a TPU (`jax.experimental.pallas.ops.tpu.splash_attention`, after arXiv 2205.14135).

The kernel holds one block of scores at a time, forward and backward, and skips blocks in which no query sees a key. The blocks that
the mask hides are known when a program is traced; those that the segments of a row hide are known when it runs (`needed_blocks`).

Letters as in `attention`; I blocks of queries, J blocks of keys, N steps of a line L of a kernel's grid, M blocks of a line.
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
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jaxtyping import Array

from metaembed_jax.precision import float32_products

SMALLEST_BLOCK = 128  # a row of a TPU's vector registers, the kernel's minimum
LARGEST_BLOCK = 512  # as in MaxText: larger blocks need fewer steps, each of which has a fixed cost
WHOLE = 2  # the kernel's mark of a block that its mask shows completely


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
    # Head h reads key head h // (H / G) in place, without repeating keys.
    kernel = make_splash_mha(
        MultiHeadMask([mask] * H),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    attend = _all_rows if shape == (query_block, key_block) else _each_row
    attend = _in_float32(attend) if query_BSHK.dtype == jnp.float32 else attend
    mixed_BHSK = attend(kernel, query_BHSK, key_BGTK, value_BGTK, segments)
    return jnp.swapaxes(mixed_BHSK, 1, 2)[:, :S]  # pyright: ignore[reportArgumentType]  vmap loses the type


def _all_rows(kernel: SplashAttentionKernel, *arrays):
    """Run the kernel once for all rows. Rows of one block have none to skip."""
    return jax.vmap(kernel)(*arrays)


def _each_row(kernel: SplashAttentionKernel, *arrays):
    """Run the kernel on one row after another, on the blocks that the row's segments need."""

    def attend(row):
        *arrays, segments = row
        return needed_blocks(kernel, segments)(*arrays, segments)

    # `vmap` makes a loop too, but moves more: 59.4 TiB of HBM traffic a step for 3b on v6e:1x1, and 57.6 this way.
    return jax.lax.map(attend, arrays)


def needed_blocks(kernel: SplashAttentionKernel, segments: SegmentIds) -> SplashAttentionKernel:
    """Restrict a kernel to the blocks of scores that the segments of one row need.

    A block runs if the ranges of segments of its queries and of its keys overlap. Padding, segment 0, needs none.
    """
    sizes = kernel.kwargs["block_sizes"]
    (first_I, last_I), (first_J, last_J) = _ranges(segments.q, sizes.block_q), _ranges(segments.kv, sizes.block_kv)
    shared_IJ = (first_I[:, None] <= last_J) & (first_J <= last_I[:, None])
    forward = _restricted(kernel.fwd_mask_info, shared_IJ)
    backward = _restricted(kernel.dkv_mask_info, shared_IJ.T, by_key=True)
    return SplashAttentionKernel(forward, forward, backward, **kernel.kwargs)


def _ranges(segments_S: Array, block: int) -> tuple[Array, Array]:
    """Return the first and the last segment of each block; the range of a block of padding is empty."""
    segments_IS = segments_S.reshape(-1, block)
    nothing = jnp.iinfo(segments_IS.dtype).max
    return jnp.where(segments_IS > 0, segments_IS, nothing).min(1), segments_IS.max(1)


def _restricted(info, shared_LM: Array, by_key: bool = False):
    """Restrict the steps of a grid, some of which a static mask may already skip.

    Args:
      info: the kernel's `MaskInfo`.
      shared_LM: the blocks that the segments need, for each line of the grid: a block of queries, or with `by_key` one of keys.
      by_key: True for the grid of the gradients of keys and values.
    """
    if info.data_next is None:  # the mask has all blocks
        blocks_LN = jnp.broadcast_to(jnp.arange(shared_LM.shape[1]), shared_LM.shape)
        kinds_LN = jnp.full_like(blocks_LN, WHOLE)
    else:
        blocks_LN, kinds_LN = (jnp.asarray(x[0].T if by_key else x[0], jnp.int32) for x in (info.data_next, info.block_mask))
    runs_LN = (kinds_LN > 0) & jnp.take_along_axis(shared_LM, blocks_LN, 1)
    if by_key:  # after a line come the queries of another head
        fetched_LN = jax.vmap(upcoming)(runs_LN, blocks_LN)
    else:
        # Queries without a visible key run their first block: otherwise their results would be 0 / 0.
        runs_LN = runs_LN.at[:, 0].max(~runs_LN.any(1))
        fetched_LN = upcoming(runs_LN.ravel(), blocks_LN.ravel()).reshape(runs_LN.shape)
    kinds_LN = jnp.where(runs_LN, kinds_LN, 0)
    data_next, block_mask = (x.T[None] if by_key else x[None] for x in (fetched_LN, kinds_LN))
    return info._replace(data_next=data_next, block_mask=block_mask)


def upcoming(runs_N: Array, blocks_N: Array) -> Array:
    """Return the block in memory at each step: that of the next step that runs; after the last such step, that of the last.

    So a skipped step fetches nothing, and the next block is fetched while the block before is computed.
    """
    N = runs_N.size
    last = N - 1 - jnp.argmax(runs_N[::-1])
    return blocks_N[jax.lax.cummin(jnp.where(runs_N, jnp.arange(N), N + last), reverse=True) % N]


def _in_float32(function: Callable) -> Callable:
    """Give a function float32 products in its backward pass too: a `custom_vjp` does not see the caller's context there."""

    def in_context(traced: Callable) -> Callable:
        def call(*arrays):
            with float32_products(jnp.float32):
                return traced(*arrays)

        return call

    in_float32 = jax.custom_vjp(in_context(function))
    in_float32.defvjp(in_context(partial(jax.vjp, function)), in_context(lambda pull, cotangent: pull(cotangent)))
    return in_float32


def _block(length: int) -> int:
    """Return the size of blocks for a length: the fewest blocks, of equal size."""
    blocks = -(-length // LARGEST_BLOCK)
    return SMALLEST_BLOCK * -(-length // (SMALLEST_BLOCK * blocks))


def _pad(x_BS: Array, block: int) -> Array:
    """Pad the second axis with zeros to whole blocks."""
    return jnp.pad(x_BS, [(0, 0), (0, -x_BS.shape[1] % block)] + [(0, 0)] * (x_BS.ndim - 2))
