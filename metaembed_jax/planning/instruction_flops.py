"""FLOPs of single instructions: two for each multiplication and addition that is done, none for products with padding."""

import math
import re
from functools import cache

import numpy as np

from metaembed_jax.planning.hlo import Computation, Instruction

_COST = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')  # some texts have the keys sorted
_WINDOW = ("stride", "lhs_dilate", "rhs_dilate")


def flops(computation: Computation, instruction: Instruction) -> int:
    """Count a `dot`, a `convolution` (which is what a TPU makes of matrix products), or a kernel with a cost estimate; else 0.

    Custom kernels without a cost estimate count as nothing: see `lacks_estimate`.
    """
    if instruction.opcode == "dot":
        (contracted,) = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = computation[instruction.operands[0]].shapes[0].dims
        width = math.prod(dims[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * math.prod(instruction.shapes[0].dims) * width
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    estimate = _COST.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return int(estimate[1]) if estimate else 0


def lacks_estimate(instruction: Instruction) -> bool:
    """Return whether this is a custom kernel without a cost estimate."""
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes and not _COST.search(instruction.attributes)


def _convolution(computation: Computation, instruction: Instruction) -> int:
    """Count a convolution.

    The compiler often writes a batch axis of a matrix product as a spatial axis, with a window as wide as the axis. Nearly all of
    the window then meets padding.
    """
    attributes = instruction.attributes
    (labels,) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    shapes = *(computation[name].shapes[0].dims for name in instruction.operands[:2]), instruction.shapes[0].dims
    inputs, kernel, out = (dict(zip(axes, dims, strict=True)) for axes, dims in zip(labels, shapes, strict=True))
    window = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(entry.split("=") for entry in window[1].split()) if window else {}
    products = out["b"] * out["f"] * kernel["i"]
    if groups := re.search(r"batch_group_count=(\d+)", attributes):
        products = products * (inputs["b"] // int(groups[1])) // inputs["b"]
    for number, axis in enumerate(sorted(key for key in out if key.isdigit())):
        stride, dilation, step = (int(window.get(key, "x".join("1" * 9)).split("x")[number]) for key in _WINDOW)
        padding = int(window["pad"].split("x")[number].split("_")[0]) if "pad" in window else 0
        products *= _count_inputs(inputs[axis], kernel[axis], out[axis], stride, dilation, step, padding)
    return 2 * products


@cache
def _count_inputs(inputs: int, window: int, outputs: int, stride: int, dilation: int, step: int, padding: int) -> int:
    """Count the pairs (output, element of the window) along one axis that meet an input, not padding or a hole between inputs.

    Args:
      dilation: distance between inputs.
      step: distance between elements of the window.
      padding: positions before the first input.
    """
    starts, total = np.arange(outputs) * stride - padding, 0
    for element in range(window):
        position = starts + element * step
        total += int(((position >= 0) & (position <= (inputs - 1) * dilation) & (position % dilation == 0)).sum())
    return total
