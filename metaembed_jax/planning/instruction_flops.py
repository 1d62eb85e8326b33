"""FLOPs of single instructions: two for each multiplication and addition that is done, none for products with padding."""

import math
import re
from functools import cache

import numpy as np

from metaembed_jax.planning.hlo import Computation, Instruction


def flops(computation: Computation, one: Instruction) -> int:
    """Of a `dot` or a `convolution`, which is what a TPU makes of matrix products, and of a kernel that states its own; else 0.

    Custom kernels without such a statement count as nothing: see `is_silent`.
    """
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        left = computation[one.operands[0]].shapes[0].dims
        return 2 * math.prod(one.shapes[0].dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    if one.opcode == "convolution":
        return _convolution(computation, one)
    stated = _COST.search(one.attributes) if one.opcode == "custom-call" else None
    return int(stated[1]) if stated else 0


def is_silent(one: Instruction) -> bool:
    """Whether it is a custom kernel that does not say how many FLOPs it does."""
    return 'custom_call_target="tpu_custom_call"' in one.attributes and not _COST.search(one.attributes)


_COST = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')  # keys are sorted in some texts


def _convolution(computation: Computation, one: Instruction) -> int:
    """Batch axes of a product often stand as space with a window as wide as the axis, nearly all of which sees padding."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    sizes = [computation[name].shapes[0].dims for name in one.operands[:2]]
    left, right, out = (dict(zip(*pair, strict=True)) for pair in ((left, sizes[0]), (right, sizes[1]), (out, one.shapes[0].dims)))
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    products = out["b"] * out["f"] * right["i"]
    if groups := re.search(r"batch_group_count=(\d+)", one.attributes):
        products = products * (left["b"] // int(groups[1])) // left["b"]
    for number, axis in enumerate(sorted(key for key in out if key.isdigit())):
        stride, dilation, reach = (int(window.get(key, "x".join("1" * 9)).split("x")[number]) for key in _WINDOW)
        before = int(window["pad"].split("x")[number].split("_")[0]) if "pad" in window else 0
        products *= _meetings(left[axis], right[axis], out[axis], stride, dilation, reach, before)
    return 2 * products


_WINDOW = ("stride", "lhs_dilate", "rhs_dilate")


@cache
def _meetings(inputs: int, window: int, outputs: int, stride: int, dilation: int, reach: int, before: int) -> int:
    """How many pairs (place of the window, element of it) of a convolution over one axis meet an input, not padding or a hole."""
    starts, total = np.arange(outputs) * stride - before, 0
    for element in range(window):
        place = starts + element * reach
        total += int(((place >= 0) & (place <= (inputs - 1) * dilation) & (place % dilation == 0)).sum())
    return total
