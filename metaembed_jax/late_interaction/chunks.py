"""Chunks of queries, so that the similarities of a step of the loss do not take memory for all pairs of items."""

import jax.numpy as jnp

CHUNK_BYTES = 16 << 20  # of the similarities of a chunk, which fit a CPU's cache


def equal_chunks(queries: int, most: int) -> int:
    """Return the size of chunks of at most `most` queries; chunks of nearly equal size need little padding."""
    return -(-queries // -(-queries // most))


def split_chunks(x, size: int, axis: int = 0):
    """Reshape [..., B, ...] to [chunks, ..., size, ...]; the last chunk is padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :]), axis, 0)
