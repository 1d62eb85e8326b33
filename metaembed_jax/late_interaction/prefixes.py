"""Prefixes of vectors: a vector that is cut to a width is divided by its length, so that it is a unit vector again."""

from typing import TypeVar

import jax
import numpy as np

from metaembed_jax.errors import UserError

SQUARED_LENGTH = 1e-24  # added to squares, as by `network`: a prefix of zeros stays zeros

Numbers = TypeVar("Numbers", np.ndarray, jax.Array)


def unit_prefix(x: Numbers, width: int) -> Numbers:
    """Return the first `width` numbers of vectors [..., D], float32, divided by their length; for a width of 0 or D, the vectors.

    Raises:
      UserError: the width is not between 0 and D.
    """
    full = x.shape[-1]
    if not isinstance(width, int | np.integer) or not 0 <= width <= full:
        raise UserError(f"width={width!r}: expected 0 (all) to {full}, the numbers of a vector")
    if width in (0, full):
        return x
    prefix = x[..., :width].astype(np.float32)
    return prefix / ((prefix * prefix).sum(-1, keepdims=True) + SQUARED_LENGTH) ** 0.5  # pyright: ignore[reportReturnType]


def cut(x: Numbers, width: int) -> Numbers:
    """Return `unit_prefix` in the vectors' own type: a TPU multiplies bfloat16 in one pass, and float32 in six."""
    return unit_prefix(x, width).astype(x.dtype)
