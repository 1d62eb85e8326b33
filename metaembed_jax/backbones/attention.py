"""Attention, chosen where a program is lowered: JAX's splash kernel on a TPU, XLA's own everywhere else.

XLA writes the scores of all pairs to memory, [B, H, S, T]; the kernel (`jax.experimental.pallas.ops.tpu.splash_attention`, after
arXiv 2205.14135) holds one block of them at a time, forward and backward, and skips those that no query may see. Compiled for v5e,
8 causal sequences of 2048, 16 heads of 128, with gradients: 4128 MiB of temporaries with XLA, 518 MiB with the kernel.

B batch, S queries, T keys, H heads, G key/value heads, K head width.
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
from jaxtyping import Array, Bool, Float

from metaembed_jax.precision import float32_products
from metaembed_jax.sharding import named_sharding

SMALLEST_BLOCK = 128  # a row of a TPU's vector registers; the kernel takes no less
LARGEST_BLOCK = 512  # as MaxText's: the larger, the fewer steps, each with a cost of its own


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

    Fewer keys than a block (a vision window has 64) go to XLA on a TPU too: the kernel would fill them up, and compute four scores
    for each. Compiled for v5e, 320 windows, 16 heads of 80, with gradients: 560 MiB of temporaries with XLA, 1362 MiB with the
    kernel, and still 644 MiB if windows shared blocks.
    """
    arrays, kind = (query_BSHK, key_BTGK, value_BTGK, key_mask_BT), dict(causal=causal, scale=scale, softcap=softcap, window=window)
    if key_BTGK.shape[1] < SMALLEST_BLOCK:
        return _xla(*arrays, **kind)
    return jax.lax.platform_dependent(*arrays, tpu=partial(_splash, **kind), default=partial(_xla, **kind))


def _xla(query_BSHK, key_BTGK, value_BTGK, key_mask_BT, *, causal, scale=None, softcap=None, window=None):
    mask = key_mask_BT[:, None, None, :]
    if causal:
        S, T = query_BSHK.shape[1], key_BTGK.shape[1]
        mask = mask & jnp.tril(jnp.ones((S, T), bool), k=T - S)
        if window is not None:
            mask = mask & jnp.triu(jnp.ones((S, T), bool), k=T - S - window + 1)
    if softcap is not None:
        return _xla_capped(query_BSHK, key_BTGK, value_BTGK, mask, scale, softcap)
    return jax.nn.dot_product_attention(query_BSHK, key_BTGK, value_BTGK, mask=mask, scale=scale, implementation="xla")


def _xla_capped(query_BSHK, key_BTGK, value_BTGK, mask, scale, softcap):
    """What `jax.nn.dot_product_attention` has no option for. N query heads to a key head."""
    B, S, _, K = query_BSHK.shape
    query_BSGNK = query_BSHK.reshape(B, S, key_BTGK.shape[2], -1, K)
    scores_BGNST = jnp.einsum("bsgnk,btgk->bgnst", query_BSGNK, key_BTGK, preferred_element_type=jnp.float32)
    scores_BGNST = softcap * jnp.tanh(scores_BGNST * ((K**-0.5 if scale is None else scale) / softcap))
    scores_BGNST = jnp.where(mask[:, None], scores_BGNST, jnp.finfo(jnp.float32).min)
    weights_BGNST = jax.nn.softmax(scores_BGNST, axis=-1).astype(value_BTGK.dtype)
    return jnp.einsum("bgnst,btgk->bsgnk", weights_BGNST, value_BTGK).reshape(query_BSHK.shape)


def _splash(query_BSHK, key_BTGK, value_BTGK, key_mask_BT, **kind):
    """The kernel on each device's rows and heads, which the partitioner, blind to what is in a kernel, would gather."""
    kernel = partial(_splash_on_one_device, **kind)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query_BSHK, key_BTGK, value_BTGK, key_mask_BT)
    # Where the key heads do not split, neither do the query heads: each must lie with its own.
    heads = named_sharding(mesh, ("batch", None, "heads", None), key_BTGK.shape).spec
    rows = named_sharding(mesh, ("batch", None), key_mask_BT.shape).spec
    on_mesh = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return on_mesh(query_BSHK, key_BTGK, value_BTGK, key_mask_BT)


def _splash_on_one_device(
    query_BSHK, key_BTGK, value_BTGK, key_mask_BT, *, causal, scale=None, softcap=None, window=None, interpret=False
):
    (S, H, K), T = query_BSHK.shape[1:], key_BTGK.shape[1]
    query_block, key_block = _block(S), _block(T)
    scaled_BSHK = (query_BSHK.astype(jnp.float32) * (K**-0.5 if scale is None else scale)).astype(query_BSHK.dtype)
    query_BHSK = jnp.swapaxes(_fill(scaled_BSHK, query_block), 1, 2)
    key_BGTK, value_BGTK = (jnp.swapaxes(_fill(x, key_block), 1, 2) for x in (key_BTGK, value_BTGK))
    # Every query looks at segment 1: the keys that are neither padding nor filling.
    segments = SegmentIds(
        q=jnp.ones((query_BHSK.shape[0], query_BHSK.shape[2]), jnp.int32), kv=_fill(key_mask_BT, key_block).astype(jnp.int32)
    )
    shape = query_BHSK.shape[2], key_BGTK.shape[2]
    if causal:
        mask = CausalMask(shape, offset=T - S) if window is None else LocalMask(shape, (window - 1, 0), offset=T - S)
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
    # Head h reads key head h // (H / G) where it lies; nothing is repeated.
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
    """A function with float32 products, in its backward pass too, where a `custom_vjp` in it would not see the caller's context."""

    def traced(function):
        def call(*arrays):
            with float32_products(jnp.float32):
                return function(*arrays)

        return call

    in_float32 = jax.custom_vjp(traced(function))
    in_float32.defvjp(traced(partial(jax.vjp, function)), traced(lambda pull, cotangent: pull(cotangent)))
    return in_float32


def _block(length: int) -> int:
    """The size of equal blocks, as few as can be, that hold a length."""
    blocks = -(-length // LARGEST_BLOCK)
    return SMALLEST_BLOCK * -(-length // (SMALLEST_BLOCK * blocks))


def _fill(x_BS: Array, block: int) -> Array:
    """Zeros at the end of the second axis, to whole blocks."""
    return jnp.pad(x_BS, [(0, 0), (0, -x_BS.shape[1] % block)] + [(0, 0)] * (x_BS.ndim - 2))
