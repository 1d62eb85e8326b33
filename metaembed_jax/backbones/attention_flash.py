"""Flash attention on NVIDIA cards: JAX's Pallas kernel (`jax.experimental.pallas.ops.gpu.attention`, after arXiv 2205.14135).

The kernel holds one block of scores at a time, forward and backward. Its sums are float32.

Letters as in `attention`.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

# The fastest blocks of those tried on an H200 on rows of five items: 1.4 ms forward and 5.6 ms with gradients for
# [8, 2432, 28, 128], causal. The kernel's default takes 1.7 and 10.9 ms.
QUERIES, KEYS, BACKWARD, WARPS = 128, 64, 64, 4
# With these blocks, compiled by Triton 3.9, heads of 128 take at most 105 KiB of shared memory on a B200, 96 on an H100, 73 on an
# A100, an L4 or an RTX 4090. Heads of 256 take 144 on the last three; an RTX 4090 has 99.
LARGEST_WIDTH = 128


def flash_takes(width: int, dtype) -> bool:
    """Return whether the kernel takes heads of this width and dtype. It multiplies float32 in TF32, so float32 is refused."""
    return width <= LARGEST_WIDTH and np.dtype(dtype) == jnp.bfloat16


def flash(query_BSHK, key_BSGK, value_BSGK, segments_BS, _, *, causal, scale=None, interpret=False):
    """Run the kernel on one device; see `attention`. It is for self-attention: each query must see at least itself."""
    # JAX deprecates this module in favour of tokamax. tokamax 0.0.12, the last release for Python 3.11, calls functions
    # that jax 0.11 no longer has; later releases need Python 3.12, and were not tried.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernels

    S, H, K = query_BSHK.shape[1:]
    heads = H // key_BSGK.shape[2]
    arrays = query_BSHK, *(jnp.repeat(x_BSGK, heads, axis=2) for x_BSGK in (key_BSGK, value_BSGK)), segments_BS
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
    return mixed_BSHK[:, :S]  # pyright: ignore[reportIndexIssue]  custom_vjp loses the type


def has_card_before_ampere() -> bool:
    """Return whether this host has an NVIDIA card on which Triton, the kernel's compiler, has no bfloat16."""
    return any(
        device.platform == "gpu" and device.compute_capability.startswith(("5.", "6.", "7.")) for device in jax.local_devices()
    )
