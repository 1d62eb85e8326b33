"""How tensors of Hugging Face's files and parameters become each other: a family's table `KEYS` gives each its `Source`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """The tensor that a parameter is read from, and how it is written back.

    Attributes:
      key: its name in the files, with `{}` for what tells the layers apart where the parameter is a stack.
      shape: from the shape of the parameter (of one layer) to that of the tensor.
      read: from the tensor to the parameter (of one layer), both NumPy.
      write: from the parameter to the tensor, or to its part of it.
      part: the place of that part among all parts, which lie behind each other on the tensor's first axis.
      places: from the family's `Config` and a layer's number in the stack to what each `{}` stands for; None: to the number.
    """

    key: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    part: int = 0
    places: Callable[[object, int], tuple] | None = None

    def name(self, architecture: object, layer: int) -> str:
        """The key for a layer of a stack; for what is no stack, the key."""
        return self.key.format(*(self.places(architecture, layer) if self.places else (layer,)))


def same(key: str) -> Source:
    """The tensor as it is."""
    return Source(key, lambda shape: shape, lambda tensor: tensor, lambda parameter: parameter)


def linear(path: str, key: str, *, bias: bool) -> dict[str, Source]:
    """A `Linear`: torch keeps its weight as [outputs, inputs]."""
    table = {f"{path}.kernel": Source(f"{key}.weight", lambda shape: shape[::-1], np.transpose, np.transpose)}
    return table | ({f"{path}.bias": same(f"{key}.bias")} if bias else {})


def norm(path: str, key: str) -> dict[str, Source]:
    """A `LayerNorm`."""
    return {f"{path}.scale": same(f"{key}.weight"), f"{path}.bias": same(f"{key}.bias")}


def fused_linears(paths: tuple[str, ...], key: str) -> dict[str, Source]:
    """Equally wide `Linear`s with biases, whose outputs lie behind each other in one tensor."""
    count, table = len(paths), {}
    for number, path in enumerate(paths):

        def part(tensor: np.ndarray, number: int = number) -> np.ndarray:
            return np.split(tensor, count)[number].T

        table[f"{path}.kernel"] = Source(f"{key}.weight", lambda shape: (count * shape[1], shape[0]), part, np.transpose, number)
        table[f"{path}.bias"] = Source(f"{key}.bias", lambda shape: (count * shape[0],), part, lambda bias: bias, number)
    return table


def patches(key: str) -> Source:
    """The kernel [D, 3, y, x] of patches. The parameter is [3 * y * x, D], in (channel, y, x) order."""

    def shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(kernel[0] // 3)
        return (kernel[1], 3, side, side)

    return Source(
        key, shape, lambda tensor: tensor.reshape(len(tensor), -1).T, lambda kernel: kernel.T.reshape(shape(kernel.shape))
    )


def still_patches(key: str) -> Source:
    """The kernel [D, 3, 2, y, x] of patches of two frames, for a still image: its frames are equal, so their kernels are summed.

    The parameter is [3 * y * x, D], in (channel, y, x) order. Written back, each frame gets half, which is exact.
    """

    def shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(kernel[0] // 3)
        return (kernel[1], 3, 2, side, side)

    def write(kernel: np.ndarray) -> np.ndarray:
        halves = np.empty(shape(kernel.shape), np.float32)
        halves[:] = kernel.astype(np.float32).T.reshape(kernel.shape[1], 3, 1, *halves.shape[3:]) / 2
        return halves

    return Source(key, shape, lambda tensor: tensor.astype(np.float32).sum(axis=2).reshape(len(tensor), -1).T, write)
