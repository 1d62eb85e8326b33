"""Prefixes of vectors: a vector that is cut to a width is divided by its length, so that it is a unit vector again."""

from typing import TypeVar

import jax
import numpy as np

SQUARED_LENGTH = 1e-24  # added to squares, as by `network`: a prefix of zeros stays zeros

Numbers = TypeVar("Numbers", np.ndarray, jax.Array)


def unit_prefix(x: Numbers, width: int) -> Numbers:
    """Return the first `width` numbers of vectors [..., D], float32, divided by their length; of D or 0 numbers, the vectors."""
    if width in (0, x.shape[-1]):
        return x
    prefix = x[..., :width].astype(np.float32)
    return prefix / ((prefix * prefix).sum(-1, keepdims=True) + SQUARED_LENGTH) ** 0.5  # pyright: ignore[reportReturnType]
