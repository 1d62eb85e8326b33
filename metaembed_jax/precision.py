"""Float32 products that are computed in float32, on every chip.

By default, a TPU rounds the factors of a float32 product to bfloat16, and a recent NVIDIA card to TF32.
"""

import contextlib

import jax
import jax.numpy as jnp


def float32_products(dtype) -> contextlib.AbstractContextManager:
    """Return a context for tracing a computation in `dtype`: with float32, products that name no precision get the highest.

    Their gradients get it too, except those of a `custom_vjp`, which is traced later and needs a context of its own.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
