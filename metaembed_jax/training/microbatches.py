"""Encoding of a step's rows in microbatches, and what of it the backward pass computes again: the ladder of `config.recompute`.

    everything   a microbatch at a time, and in it a layer at a time: only vectors are kept (GradCache, arXiv 2101.06983)
    layers       a layer at a time: the inputs of the layers of all microbatches are kept
    nothing      all is kept that a gradient reads

The gradient is that of the whole batch on every rung.

M microbatches of b rows, V vectors of a row, D width.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from metaembed_jax.batch.rows import Batch

RECOMPUTE = ("everything", "layers", "nothing")


def encode(apply: Callable, rows: Batch, recompute: str, dtype: str) -> Float[Array, "M*b V D"]:
    """The vectors of all rows of a step.

    Args:
      apply: `(row numbers) -> network`. Its dropout, if any, depends on the numbers of the rows and not on their microbatches.
      rows: [M, b, ...], in the memory of the devices or their hosts.
      recompute: a rung of `RECOMPUTE`.
      dtype: of the vectors.
    """

    def encoder(microbatch: Batch) -> Float[Array, "b V D"]:
        microbatch = microbatch.map(to_device)
        return apply(microbatch.row)(microbatch).astype(dtype)

    microbatches, size = rows.tokens.shape[:2]
    if microbatches == 1:
        return encoder(rows.map(lambda x: x[0]))
    vectors_MbVD = jax.lax.map(jax.checkpoint(encoder) if recompute == "everything" else encoder, rows)
    return vectors_MbVD.reshape(microbatches * size, *vectors_MbVD.shape[2:])


def to_device(x: Array) -> Array:
    """Move an array to the devices' memory, if it is in the hosts'."""
    in_host = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if in_host else x
