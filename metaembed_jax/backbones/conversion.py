"""How tensors of Hugging Face's files become parameters. A family's table `KEYS` maps each parameter to its `Source`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """The tensor that a parameter is read from.

    Attributes:
      key: its name in the files, with `{}` for the layer's number where the parameter is a stack.
      shape: from the shape of the parameter (of one layer) to that of the tensor.
      read: from the tensor to the parameter (of one layer), both NumPy.
    """

    key: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[np.ndarray], np.ndarray]


def same(key: str) -> Source:
    """The tensor as it is."""
    return Source(key, lambda shape: shape, lambda tensor: tensor)


def linear(path: str, key: str, *, bias: bool) -> dict[str, Source]:
    """A `Linear`: torch keeps its weight as [outputs, inputs]."""
    table = {f"{path}.kernel": Source(f"{key}.weight", lambda shape: shape[::-1], np.transpose)}
    return table | ({f"{path}.bias": same(f"{key}.bias")} if bias else {})


def fused_linears(paths: tuple[str, ...], key: str) -> dict[str, Source]:
    """Equally wide `Linear`s with biases, whose outputs lie behind each other in one tensor."""
    count, table = len(paths), {}
    for number, path in enumerate(paths):

        def part(tensor: np.ndarray, number: int = number) -> np.ndarray:
            return np.split(tensor, count)[number].T

        table[f"{path}.kernel"] = Source(f"{key}.weight", lambda shape: (count * shape[1], shape[0]), part)
        table[f"{path}.bias"] = Source(f"{key}.bias", lambda shape: (count * shape[0],), part)
    return table


def still_patches(key: str) -> Source:
    """The kernel [D, 3, 2, y, x] of patches of two frames, for a still image: its frames are equal, so their kernels are summed.

    The parameter is [3 * y * x, D], in (channel, y, x) order.
    """

    def shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(kernel[0] // 3)
        return (kernel[1], 3, 2, side, side)

    return Source(key, shape, lambda tensor: tensor.astype(np.float32).sum(axis=2).reshape(len(tensor), -1).T)
