"""Flash attention on NVIDIA cards: JAX's Pallas kernel (`jax.experimental.pallas.ops.gpu.attention`, after arXiv 2205.14135).

JAX calls the module deprecated and names tokamax as its successor; tokamax 0.0.12 calls functions that jax 0.11.2 no longer has.

Letters as in `attention`.
"""

import warnings

import jax
import jax.numpy as jnp

# The fastest of those tried on an H200 on rows of five items: 1.4 ms forward and 5.6 ms with gradients for [8, 2432, 28, 128],
# causal. The kernel's own choice takes 1.7 and 10.9 ms.
QUERIES, KEYS, BACKWARD, WARPS = 128, 64, 64, 4


def flash(query_BSHK, key_BSGK, value_BSGK, segments_BS, key_segments_BS, *, causal, scale=None, interpret=False):
    """Run the kernel on one device, where queries are keys: both have the same segments. See `attention`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernels

    S, H, K = query_BSHK.shape[1:]
    heads = H // key_BSGK.shape[2]
    arrays = query_BSHK, *(jnp.repeat(x_BSGK, heads, axis=2) for x_BSGK in (key_BSGK, value_BSGK)), segments_BS
    # A query that sees nothing sees the padding behind the row, so that its numbers are finite.
    padded = (jnp.pad(x, [(0, 0), (0, -S % QUERIES)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
    sizes = kernels.BlockSizes(QUERIES, KEYS, BACKWARD, BACKWARD, BACKWARD, BACKWARD)
    mixed_BSHK = kernels.mha(
        *padded,
        sm_scale=K**-0.5 if scale is None else scale,
        causal=causal,
        block_sizes=sizes,
        num_warps=WARPS,
        interpret=interpret,
    )
    return mixed_BSHK[:, :S]


def has_card_before_ampere() -> bool:
    """Return whether this host has an NVIDIA card for which the kernel's compiler, Triton, has no bfloat16."""
    return any(
        device.platform == "gpu" and device.compute_capability.startswith(("5.", "6.", "7.")) for device in jax.local_devices()
    )
