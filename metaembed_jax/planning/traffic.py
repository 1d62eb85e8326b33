"""Bytes that an instruction reads from HBM and writes to it, and the buffers that it makes there.

A fusion reads its operands and writes its results, whatever it computes in between. A slice costs the bytes that it takes, not
those of its operand. An update in place costs the bytes that it replaces. A custom kernel that states its traffic may read part of
its operands, or read them several times. Arrays on the chip cost nothing, though a kernel's statement counts them once.
"""

import re

from metaembed_jax.planning.hlo import Computation, Instruction, Module, Shape

# These only name values, or are counted elsewhere: the bodies of loops and calls by themselves, a collective at its end.
FREE = "parameter constant tuple get-tuple-element bitcast after-all while conditional call async-start".split()
_STATED = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"?(\d+)')
SLICES = ("dynamic-slice", "slice", "gather")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes to and from HBM of an instruction outside fusions."""
    if instruction.opcode in FREE or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0
    if instruction.opcode in SLICES:
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * computation[instruction.operands[1]].bytes
    if instruction.opcode == "custom-call" and (stated := _STATED.search(instruction.attributes)):
        arrays = [*instruction.shapes, *(shape for name in instruction.operands for shape in computation[name].shapes)]
        return max(int(stated[1]) - sum(shape.bytes for shape in arrays if not shape.in_hbm), 0)
    if instruction.opcode == "send":  # the host reads the operand
        return computation[instruction.operands[0]].bytes
    written = sum(size for _, size, _ in _results(module, instruction))
    if instruction.opcode == "slice-start":  # fetches its result ahead, mostly to the chip; its operand is the whole array
        in_hbm = computation[instruction.operands[0]].shapes[0].in_hbm
        return written + (_started(instruction)[0].bytes if in_hbm else 0)
    fused = _fused(module, instruction)
    read = 0
    for position, name in enumerate(instruction.operands):
        if all(shape.in_hbm for shape in computation[name].shapes):
            read += _read(module, fused, fused.parameter(position)) if fused else computation[name].bytes
    return read + written


def buffers(module: Module, instruction: Instruction) -> list[Shape]:
    """Return the new arrays in HBM that an instruction outside fusions makes."""
    if instruction.opcode in (*FREE, "dynamic-update-slice", "send"):
        return []
    return [shape for shape, _, is_new in _results(module, instruction) if is_new]


def _results(module: Module, instruction: Instruction) -> list[tuple[Shape, int, bool]]:
    """Return (shape, bytes written, is a new buffer) of the results in HBM."""
    shapes = _started(instruction) if instruction.opcode.endswith("-start") else instruction.shapes
    written = [(shape.bytes, True) for shape in shapes]
    if fused := _fused(module, instruction):
        root = fused.root
        results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(results) == len(shapes):
            written = [_written(module, fused, result) for result in results]
    return [(shape, *size_and_is_new) for shape, size_and_is_new in zip(shapes, written, strict=True) if shape.in_hbm]


def _started(instruction: Instruction) -> tuple[Shape, ...]:
    """Return the results of an asynchronous instruction; its other shapes are its operands again, and a semaphore."""
    return instruction.shapes[:1] if instruction.opcode == "copy-start" else instruction.shapes[len(instruction.shapes) // 2 :]


def _fused(module: Module, instruction: Instruction) -> Computation | None:
    return module.computations[instruction.called("calls")[0]] if instruction.opcode == "fusion" else None


def _read(module: Module, computation: Computation, value: Instruction) -> int:
    """Return the bytes that a fused computation reads of one of its values."""
    total = 0
    for user in computation.users(value.name):
        if user.opcode in SLICES and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif inner := _fused(module, user):
            positions = [position for position, name in enumerate(user.operands) if name == value.name]
            total += sum(_read(module, inner, inner.parameter(position)) for position in positions)
        elif user.opcode != "tuple" and not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            return value.bytes
    return min(total, value.bytes)


def _written(module: Module, computation: Computation, result: Instruction) -> tuple[int, bool]:
    """Return (bytes, is a new buffer) of a fused computation's result."""
    if result.opcode == "parameter":  # passed through
        return 0, False
    if result.opcode == "dynamic-update-slice":
        return computation[result.operands[1]].bytes, False
    if result.opcode == "bitcast":
        return _written(module, computation, computation[result.operands[0]])
    if inner := _fused(module, result):
        return _written(module, inner, inner.root)
    return result.bytes, True
