"""Float32 products in float32 precision on every chip.

By default, a TPU rounds the factors of a float32 product to bfloat16, and a recent NVIDIA card to TF32.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array


def float32_products(dtype) -> contextlib.AbstractContextManager:
    """Return a context for tracing a computation in `dtype`: with float32, products that name no precision get the highest.

    Their gradients get it too, except those of a `custom_vjp`, which is traced later and needs its own context.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def float32_einsum(equation: str, x: Array, y: Array) -> Array:
    """Return the einsum of two arrays of any float type, with float32 products, sums and result."""
    dtype = jnp.result_type(x, y)
    x, y = x.astype(dtype), y.astype(dtype)
    # At its default precision a TPU rounds float32 to bfloat16 first.
    einsum = partial(jnp.einsum, equation, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    if dtype == jnp.float32:
        return einsum(x, y)
    # XLA on a CPU has no such product of bfloat16; the result is the same if both are widened first.
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: einsum(x.astype(jnp.float32), y.astype(jnp.float32)),
        default=partial(jnp.einsum, equation, preferred_element_type=jnp.float32),
    )
