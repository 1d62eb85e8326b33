"""Parse the text of a compiled program (optimised HLO): computations of instructions with shapes, operands and attributes.

    %body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
      %p = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
      ROOT %fusion.1 = f32[8,8]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={op_name="..."}

A layout has the order of an array's axes, minor first. `T(8,128)` is the tile that the array is padded to. `S(1)` stands for a
memory on the chip instead of HBM.
"""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array of a program.

    Attributes:
      text: type and sizes, such as f32[8,8].
      dims: sizes of its axes.
      bytes: size with the padding of its tiles.
      in_hbm: false for a memory on the chip.
    """

    text: str
    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in the program.
      shapes: shapes of its results; a tuple has several.
      opcode: such as `fusion`.
      operands: names of the instructions that it reads.
      arguments: the text between its parentheses.
      attributes: the text after them.
      is_root: true for the computation's result.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The operation of the Python program, as JAX names it; without one, the instruction's own name."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def called(self, attribute: str) -> list[str]:
        """Return the names of computations in an attribute, such as `calls=%a` or `branch_computations={%a, %b}`."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return _NAME.findall(match[1] or match[2]) if match else []


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order of the text."""

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(instruction for instruction in reversed(self.values()) if instruction.is_root)

    def parameter(self, position: int) -> Instruction:
        """Return the parameter at a position."""
        parameters = (instruction for instruction in self.values() if instruction.opcode == "parameter")
        return next(parameter for parameter in parameters if parameter.arguments == str(position))

    def users(self, name: str) -> list[Instruction]:
        """Return the instructions that read a value."""
        return [instruction for instruction in self.values() if name in instruction.operands]


class Module(NamedTuple):
    """All computations of a program by name, and the name of the first to run."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parse the text of `Compiled.as_text()`."""
    computations, entry, current, name = {}, "", None, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif current is None or line == "}":
            current = None
        elif instruction := _INSTRUCTION.match(line):
            name = instruction[2]
            current[name] = _instruction(name, instruction[3], bool(instruction[1]))
        else:  # the attributes of a kernel with metadata take several lines
            current[name] = current[name]._replace(attributes=current[name].attributes + line)
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    close = _closing(text, start)
    arguments = text[start + 1 : close - 1]
    return Instruction(
        name,
        tuple(_shape(*array) for array in _ARRAY.findall(text[:end])),
        text[end:start].strip(),
        tuple(_NAME.findall(arguments)),
        arguments,
        text[close:],
        is_root,
    )


def _closing(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(text, start):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return parenthesis.end()
    raise ValueError(f"unclosed parenthesis: {text[start : start + 80]!r}")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size) for size in dims.split(",") if size)
    order, _, rest = layout.partition(":")
    minor_first = [sizes[int(axis)] for axis in order.split(",") if axis] or list(reversed(sizes))
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        padding = [int(size) for size in reversed(tile[1].split(","))]
        minor_first += [1] * (len(padding) - len(minor_first))
        padding += [1] * (len(minor_first) - len(padding))
        minor_first = [-(-size // unit) * unit for size, unit in zip(minor_first, padding, strict=True)]
    width = re.search(r"\d+", dtype)
    bits = int(width[0]) if width else 8 if dtype == "pred" else 0
    in_hbm = not re.search(r"S\([1-9]\d*\)", rest)
    return Shape(f"{dtype}[{dims}]", sizes, math.prod(minor_first) * bits // 8, in_hbm)
