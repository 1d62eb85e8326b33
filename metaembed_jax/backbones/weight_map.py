"""Entries of a weight map: how a tensor of Hugging Face's files becomes a parameter, and how the parameter is written back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """The tensor that a parameter is read from, and how it is written back.

    Attributes:
      key: name of the tensor in the files, with `{}` for the number of the layer if the parameter is a stack.
      shape: from the shape of the parameter (of one layer) to that of the tensor.
      read: from the tensor to the parameter (of one layer), both NumPy.
      write: from the parameter to the tensor, or to its share of the tensor.
      part: index of that share on the tensor's first axis, if several parameters share a tensor.
      names: from the family's `Config` and the number of a layer in the stack to a value for each `{}`; None: the number.
    """

    key: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    part: int = 0
    names: Callable[[Any, int], tuple] | None = None

    def name(self, architecture: Any, layer: int | None) -> str:
        """Return the key for a layer of a stack; `layer` is None for a parameter that is not a stack."""
        return self.key.format(*(self.names(architecture, layer) if self.names and layer is not None else (layer,)))


def same(key: str) -> Source:
    """Return the source of a parameter that is the tensor itself."""
    return Source(key, lambda shape: shape, lambda tensor: tensor, lambda parameter: parameter)


def linear(path: str, key: str, *, bias: bool) -> dict[str, Source]:
    """Return the sources of a `Linear`: torch stores its weight as [outputs, inputs]."""
    table = {f"{path}.kernel": Source(f"{key}.weight", lambda shape: shape[::-1], np.transpose, np.transpose)}
    return table | ({f"{path}.bias": same(f"{key}.bias")} if bias else {})


def norm(path: str, key: str) -> dict[str, Source]:
    """Return the sources of a `LayerNorm`."""
    return {f"{path}.scale": same(f"{key}.weight"), f"{path}.bias": same(f"{key}.bias")}


def fused_linears(paths: tuple[str, ...], key: str) -> dict[str, Source]:
    """Return the sources of `Linear`s with biases, of equal width, whose outputs are concatenated in one tensor."""
    count, table = len(paths), {}
    for number, path in enumerate(paths):

        def share(tensor: np.ndarray, number: int = number) -> np.ndarray:
            return np.split(tensor, count)[number].T

        table[f"{path}.kernel"] = Source(f"{key}.weight", lambda shape: (count * shape[1], shape[0]), share, np.transpose, number)
        table[f"{path}.bias"] = Source(f"{key}.bias", lambda shape: (count * shape[0],), share, lambda bias: bias, number)
    return table


def decoder_layers(layer: str, *, attention_bias: bool) -> dict[str, Source]:
    """Return the sources of a stack `layers`, under the names of tensors of LLaMA and later models.

    Args:
      layer: prefix of the names, with `{}` for the layer.
      attention_bias: True if queries, keys and values have biases.
    """
    return {
        "layers.input_norm.scale": same(f"{layer}.input_layernorm.weight"),
        "layers.mlp_norm.scale": same(f"{layer}.post_attention_layernorm.weight"),
        **linear("layers.query", f"{layer}.self_attn.q_proj", bias=attention_bias),
        **linear("layers.key", f"{layer}.self_attn.k_proj", bias=attention_bias),
        **linear("layers.value", f"{layer}.self_attn.v_proj", bias=attention_bias),
        **linear("layers.output", f"{layer}.self_attn.o_proj", bias=False),
        **linear("layers.mlp.gate", f"{layer}.mlp.gate_proj", bias=False),
        **linear("layers.mlp.up", f"{layer}.mlp.up_proj", bias=False),
        **linear("layers.mlp.down", f"{layer}.mlp.down_proj", bias=False),
    }


def patches(key: str) -> Source:
    """Return the source of a kernel [D, 3, y, x] of patches. The parameter is [3 * y * x, D], in (channel, y, x) order."""

    def shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(kernel[0] // 3)
        return (kernel[1], 3, side, side)

    return Source(
        key, shape, lambda tensor: tensor.reshape(len(tensor), -1).T, lambda kernel: kernel.T.reshape(shape(kernel.shape))
    )


def still_patches(key: str) -> Source:
    """Return the source of a kernel [D, 3, 2, y, x] of patches of two frames. A still image has equal frames, so it is summed.

    The parameter is [3 * y * x, D], in (channel, y, x) order. Written back, each frame gets half of it, which is exact.
    """

    def shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(kernel[0] // 3)
        return (kernel[1], 3, 2, side, side)

    def write(kernel: np.ndarray) -> np.ndarray:
        halves = np.empty(shape(kernel.shape), np.float32)
        halves[:] = kernel.astype(np.float32).T.reshape(kernel.shape[1], 3, 1, *halves.shape[3:]) / 2
        return halves

    return Source(key, shape, lambda tensor: tensor.astype(np.float32).sum(axis=2).reshape(len(tensor), -1).T, write)
