"""float32 means float32 on every chip.

Left alone, a TPU rounds the factors of a float32 product to bfloat16, and a recent NVIDIA card to TF32.
"""

import contextlib

import jax
import jax.numpy as jnp


def float32_products(dtype) -> contextlib.AbstractContextManager:
    """A context for tracing what computes in `dtype`: with float32, products that name no precision get the highest.

    It covers their gradients too, but for a `custom_vjp`: that is traced later, and needs a context of its own.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
