"""Attention by XLA: all queries at once, or one block of them after another.

Letters as in `attention`; N query heads of a key head, n blocks, b queries of a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SCORE_BYTES = 128 * 2**20  # float32 scores of a block of queries: enough to keep a card busy, and little of its memory


def xla(
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
    positions_BS=None,
):
    """Compute all scores at once; see `attention`."""
    mask_BST = query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    if causal:
        positions_BS = jnp.arange(query_BSHK.shape[1])[None] if positions_BS is None else positions_BS
        mask_BST &= _visible(positions_BS, key_BTGK.shape[1], window)
    if softcap is not None:
        return _capped(query_BSHK, key_BTGK, value_BTGK, mask_BST[:, None], scale, softcap)
    return jax.nn.dot_product_attention(query_BSHK, key_BTGK, value_BTGK, mask=mask_BST[:, None], scale=scale, implementation="xla")


def in_blocks(
    query_BSHK, key_BTGK, value_BTGK, query_segments_BS, key_segments_BT, *, causal, scale=None, softcap=None, window=None
):
    """Compute the scores of one block of queries at a time, and again in the backward pass; see `attention`."""
    S, T = query_BSHK.shape[1], key_BTGK.shape[1]
    kind = dict(causal=causal, scale=scale, softcap=softcap, window=window)
    size = queries_at_once(query_BSHK.shape, T)
    if size >= S:
        return xla(query_BSHK, key_BTGK, value_BTGK, query_segments_BS, key_segments_BT, **kind)
    blocks = -(-S // size)
    size = -(-S // blocks)

    def cut(x_BS):
        padded = jnp.pad(x_BS, [(0, 0), (0, blocks * size - S)] + [(0, 0)] * (x_BS.ndim - 2))
        return jnp.moveaxis(padded.reshape(len(padded), blocks, size, *padded.shape[2:]), 1, 0)

    positions_BS = jnp.broadcast_to(jnp.arange(S), query_segments_BS.shape)
    # In float32, so that the gradients of all blocks are summed in float32.
    key32_BTGK, value32_BTGK = key_BTGK.astype(jnp.float32), value_BTGK.astype(jnp.float32)

    @jax.checkpoint
    def attend(block):
        query_BbHK, segments_Bb, positions_Bb = block
        key, value = key32_BTGK.astype(key_BTGK.dtype), value32_BTGK.astype(value_BTGK.dtype)
        return xla(query_BbHK, key, value, segments_Bb, key_segments_BT, positions_BS=positions_Bb, **kind)

    mixed_nBbHK = jax.lax.map(attend, tuple(map(cut, (query_BSHK, query_segments_BS, positions_BS))))
    mixed_BSHK = jnp.moveaxis(mixed_nBbHK, 0, 1)
    return mixed_BSHK.reshape(len(query_BSHK), blocks * size, *query_BSHK.shape[2:])[:, :S]


def queries_at_once(query_shape: tuple[int, ...], keys: int) -> int:
    """Return the number of queries whose scores fit in `SCORE_BYTES`; at least 1."""
    B, _, H, _ = query_shape
    return max(SCORE_BYTES // (4 * B * H * keys), 1)


def _visible(positions_BS: Int[Array, "B S"], T: int, window: int | None) -> Bool[Array, "B S T"]:
    """Return the causal mask of queries at these positions."""
    positions_BS1, key_T = positions_BS[..., None], jnp.arange(T)
    visible_BST = key_T <= positions_BS1
    return visible_BST if window is None else visible_BST & (key_T > positions_BS1 - window)


def _capped(query_BSHK, key_BTGK, value_BTGK, mask, scale, softcap):
    """Compute attention with a soft cap, which `jax.nn.dot_product_attention` does not have."""
    B, S, _, K = query_BSHK.shape
    query_BSGNK = query_BSHK.reshape(B, S, key_BTGK.shape[2], -1, K)
    scores_BGNST = jnp.einsum("bsgnk,btgk->bgnst", query_BSGNK, key_BTGK, preferred_element_type=jnp.float32)
    scores_BGNST = softcap * jnp.tanh(scores_BGNST * ((K**-0.5 if scale is None else scale) / softcap))
    scores_BGNST = jnp.where(mask[:, None], scores_BGNST, jnp.finfo(jnp.float32).min)
    weights_BGNST = jax.nn.softmax(scores_BGNST, axis=-1).astype(value_BTGK.dtype)
    return jnp.einsum("bgnst,btgk->bsgnk", weights_BGNST, value_BTGK).reshape(query_BSHK.shape)
