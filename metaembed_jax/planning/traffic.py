"""Bytes that an instruction reads from HBM and writes to it, and the buffers that it makes there.

A fusion reads its operands and writes its results, whatever it does in between. A slice costs what it takes, not what it is taken
from; an update in place costs what it replaces; what lies in a memory on the chip costs nothing.
"""

from metaembed_jax.planning.hlo import Computation, Instruction, Module, Shape

# Names for values, and what others count: loops and calls are walked into, a collective is over when it is done.
FREE = "parameter constant tuple get-tuple-element bitcast after-all while conditional call async-start".split()
SLICES = ("dynamic-slice", "slice", "gather")


def traffic(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes to and from HBM of an instruction that is in no fusion."""
    if one.opcode in FREE or 'custom_call_target="AllocateBuffer"' in one.attributes:
        return 0
    if one.opcode in SLICES:
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * computation[one.operands[1]].bytes
    if one.opcode == "send":  # the host reads the operand
        return computation[one.operands[0]].bytes
    written = sum(size for _, size, _ in _results(module, one))
    if one.opcode == "slice-start":  # fetches its result ahead, most often to the chip; its operand is the whole array
        return written + (_started(one)[0].bytes if computation[one.operands[0]].shapes[0].in_hbm else 0)
    fused = _fused(module, one)
    read = 0
    for position, name in enumerate(one.operands):
        if all(shape.in_hbm for shape in computation[name].shapes):
            read += _read(module, fused, fused.parameter(position)) if fused else computation[name].bytes
    return read + written


def buffers(module: Module, one: Instruction) -> list[Shape]:
    """The arrays that an instruction in no fusion makes anew in HBM."""
    if one.opcode in (*FREE, "dynamic-update-slice", "send"):
        return []
    return [shape for shape, _, is_new in _results(module, one) if is_new]


def _results(module: Module, one: Instruction) -> list[tuple[Shape, int, bool]]:
    """(shape, bytes written, is a new buffer) of the results in HBM."""
    shapes = _started(one) if one.opcode.endswith("-start") else one.shapes
    written = [(shape.bytes, True) for shape in shapes]
    if fused := _fused(module, one):
        root = fused.root
        parts = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) == len(shapes):
            written = [_written(module, fused, part) for part in parts]
    return [(shape, *how) for shape, how in zip(shapes, written, strict=True) if shape.in_hbm]


def _started(one: Instruction) -> tuple[Shape, ...]:
    """Return the results of an asynchronous instruction; the rest are its operands again, and a semaphore."""
    return one.shapes[:1] if one.opcode == "copy-start" else one.shapes[len(one.shapes) // 2 :]


def _fused(module: Module, one: Instruction) -> Computation | None:
    return module.computations[one.called("calls")[0]] if one.opcode == "fusion" else None


def _read(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes that a fused computation reads of one of its values."""
    total = 0
    for user in computation.users(value.name):
        if user.opcode in SLICES and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif inner := _fused(module, user):
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            total += sum(_read(module, inner, inner.parameter(place)) for place in places)
        elif user.opcode != "tuple" and not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            return value.bytes
    return min(total, value.bytes)


def _written(module: Module, computation: Computation, result: Instruction) -> tuple[int, bool]:
    """(bytes, is a new buffer) of a fused computation's result."""
    if result.opcode == "parameter":  # passed through
        return 0, False
    if result.opcode == "dynamic-update-slice":
        return computation[result.operands[1]].bytes, False
    if result.opcode == "bitcast":
        return _written(module, computation, computation[result.operands[0]])
    if inner := _fused(module, result):
        return _written(module, inner, inner.root)
    return result.bytes, True
