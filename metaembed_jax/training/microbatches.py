"""Encode the rows of a step in microbatches.

`config.rows.recompute` says what the backward pass computes again instead of keeping it, from the least memory to the most:

    everything      keep the vectors; recompute a microbatch at a time and a layer at a time (GradCache, arXiv 2101.06983)
    microbatches    keep the vectors; recompute a microbatch at a time, and keep all activations of that one
    layers          keep the inputs of the layers of all microbatches; recompute a layer at a time
    nothing         keep all activations

The gradient is that of the whole batch in every case.

M microbatches of b rows, V vectors of a row, D width.
"""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from metaembed_jax.batch.rows import Batch


def encode(apply: Callable, rows: Batch, recompute: str, dtype: str) -> Float[Array, "N V D"]:
    """Return the vectors of all rows of a step.

    Args:
      apply: `(row numbers) -> network`. Its dropout, if any, depends on the numbers of the rows and not on their microbatches.
      rows: rows of a `TrainingBatch`.
      recompute: a value of `config.rows.recompute`.
      dtype: type of the vectors.
    """

    def encoder(microbatch: Batch) -> Float[Array, "b V D"]:
        microbatch = pixels_on_device(microbatch)
        if microbatch.patches is not None and microbatch.patch_segments is not None:
            pixels_BPX = microbatch.patches.reshape(*microbatch.patch_segments.shape, -1)
            microbatch = dataclasses.replace(microbatch, patches=pixels_BPX)
        return apply(microbatch.row)(microbatch).astype(dtype)

    microbatches, size = rows.tokens.shape[:2]
    if microbatches == 1:
        return encoder(pixels_on_device(rows).map(lambda x: x[0]))
    vectors_MbVD = jax.lax.map(jax.checkpoint(encoder) if recompute in ("everything", "microbatches") else encoder, rows)
    return vectors_MbVD.reshape(microbatches * size, *vectors_MbVD.shape[2:])


def pixels_on_device(batch: Batch) -> Batch:
    """Return a batch whose pixels are in the devices' memory; they may be in a host's memory before."""
    if batch.patches is None or jax.typeof(batch.patches).memory_space != jax.memory.Space.Host:
        return batch
    return dataclasses.replace(batch, patches=jax.device_put(batch.patches, jax.memory.Space.Device))
