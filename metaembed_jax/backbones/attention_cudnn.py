"""cuDNN's flash attention on NVIDIA cards, by `jax.nn.dot_product_attention`.

cuDNN takes a row's padding as a length. So the visible keys of each row are moved to its front, in their order, and with a causal
mask its queries with them. A mask as an array would be one number for each pair, and has made gradients NaN on Hopper cards
(https://github.com/pytorch/pytorch/issues/196678).

JAX's XLA implementation takes the same arguments; with it, tests on a CPU check everything here except cuDNN itself, which was
compiled for an H100 and not run.

Letters as in `attention`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

WIDTH_MULTIPLE = 8  # of a head: cuDNN takes no other


def cudnn(query_BSHK, key_BTGK, value_BTGK, key_mask_BT, *, causal, scale=None, softcap=None, window=None, implementation="cudnn"):
    """Run the kernel on one device; see `attention`. With `causal` there are as many queries as keys."""
    assert softcap is None and window is None and (not causal or query_BSHK.shape[1] == key_BTGK.shape[1])
    K, T = key_BTGK.shape[3], key_BTGK.shape[1]
    query, key, value = (_pad_width(x) for x in (query_BSHK, key_BTGK, value_BTGK))
    order_BT = jnp.argsort(~key_mask_BT, axis=1, stable=True)
    inverse_BT = jnp.argsort(order_BT, axis=1)
    # A row without a visible key sees its first one: a softmax over nothing is NaN.
    lengths_B = jnp.maximum(key_mask_BT.sum(axis=1, dtype=jnp.int32), 1)
    is_key_BT11 = (jnp.arange(T) < lengths_B[:, None])[..., None, None]
    # The kernel may leave anything in the gradients behind a row's length; `where` stops it.
    key, value = (jnp.where(is_key_BT11, _reorder(x, order_BT, inverse_BT), 0) for x in (key, value))
    mixed_BSHK = jax.nn.dot_product_attention(
        _reorder(query, order_BT, inverse_BT) if causal else query,
        key,
        value,
        scale=K**-0.5 if scale is None else scale,
        is_causal=causal,
        key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )
    return (_reorder(mixed_BSHK, inverse_BT, order_BT) if causal else mixed_BSHK)[..., :K]


def _pad_width(x_BTHK: Array) -> Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, 0), (0, 0), (0, -x_BTHK.shape[3] % WIDTH_MULTIPLE)))


@jax.custom_vjp
def _reorder(x_BT: Array, order_BT: Int[Array, "B T"], inverse_BT: Int[Array, "B T"]) -> Array:
    """Reorders the positions of each row. Its gradient is reordered too; JAX's own would be a scatter-add."""
    return jnp.take_along_axis(x_BT, order_BT[:, :, None, None], axis=1)


def _forward(x_BT, order_BT, inverse_BT):
    return _reorder(x_BT, order_BT, inverse_BT), (order_BT, inverse_BT)


def _backward(orders, gradient_BT):
    order_BT, inverse_BT = orders
    return _reorder(gradient_BT, inverse_BT, order_BT), None, None


_reorder.defvjp(_forward, _backward)
