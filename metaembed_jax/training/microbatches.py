"""Encoding of a step's rows in microbatches, and what the backward pass computes again: the ladder of `config.rows.recompute`.

    everything      a microbatch at a time, and in it a layer at a time: only vectors are kept (GradCache, arXiv 2101.06983)
    microbatches    a microbatch at a time: of one, all is kept that a gradient reads
    layers          a layer at a time: the inputs of the layers of all microbatches are kept
    nothing         all is kept that a gradient reads

The gradient is that of the whole batch on every rung.

M microbatches of b rows, V vectors of a row, D width.
"""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from metaembed_jax.batch.rows import Batch


def encode(apply: Callable, rows: Batch, recompute: str, dtype: str) -> Float[Array, "N V D"]:
    """The vectors of all rows of a step.

    Args:
      apply: `(row numbers) -> network`. Its dropout, if any, depends on the numbers of the rows and not on their microbatches.
      rows: of a `TrainingBatch`.
      recompute: a rung of the ladder.
      dtype: of the vectors.
    """

    def encoder(microbatch: Batch) -> Float[Array, "b V D"]:
        microbatch = pixels_on_device(microbatch)
        if microbatch.patches is not None:
            pixels_BPX = microbatch.patches.reshape(*microbatch.patch_segments.shape, -1)
            microbatch = dataclasses.replace(microbatch, patches=pixels_BPX)
        return apply(microbatch.row)(microbatch).astype(dtype)

    microbatches, size = rows.tokens.shape[:2]
    if microbatches == 1:
        return encoder(pixels_on_device(rows).map(lambda x: x[0]))
    vectors_MbVD = jax.lax.map(jax.checkpoint(encoder) if recompute in ("everything", "microbatches") else encoder, rows)
    return vectors_MbVD.reshape(microbatches * size, *vectors_MbVD.shape[2:])


def pixels_on_device(batch: Batch) -> Batch:
    """Return a batch whose pixels are in the devices' memory, wherever they were."""
    if batch.patches is None or jax.typeof(batch.patches).memory_space != jax.memory.Space.Host:
        return batch
    return dataclasses.replace(batch, patches=jax.device_put(batch.patches, jax.memory.Space.Device))
