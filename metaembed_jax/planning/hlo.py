"""Reads the text of a compiled program (optimised HLO): computations of instructions, each with shapes, operands and attributes.

    %body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
      %p = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
      ROOT %fusion.1 = f32[8,8]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={op_name="..."}

A layout says how an array lies: the order of its axes, minor first, `T(8,128)` the tile that it is padded to, and `S(1)` that it
is not in HBM but in a memory on the chip.
"""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array of a program: its text, sizes of axes, bytes with the padding of its tiles, and whether it is in HBM."""

    text: str
    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in the program.
      shapes: of its results, those of a tuple one after the other.
      opcode: such as `fusion`.
      operands: names of what it reads.
      arguments: the text between its parentheses.
      attributes: the text after them.
      is_root: it is the computation's result.
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
        """Of all results."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, as JAX wrote it down; else its own name."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, such as `calls=%a` or `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return _NAME.findall(found[1] or found[2]) if found else []


class Computation(dict):
    """Instructions by name, in the order of the text."""

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(one for one in reversed(self.values()) if one.is_root)

    def parameter(self, position: int) -> Instruction:
        """An argument, by its position."""
        return next(one for one in self.values() if one.opcode == "parameter" and one.arguments == str(position))

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read a value."""
        return [one for one in self.values() if name in one.operands]


class Module(NamedTuple):
    """All computations of a program by name, and the name of the one that it starts with."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The module of a text as `Compiled.as_text()` gives it."""
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
        else:  # the attributes of a kernel with metadata go on over several lines
            current[name] = current[name]._replace(attributes=current[name].attributes + line)
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    close = _closing(text, start)
    arguments = text[start + 1 : close - 1]
    return Instruction(
        name,
        tuple(_shape(*found) for found in _ARRAY.findall(text[:end])),
        text[end:start].strip(),
        tuple(_NAME.findall(arguments)),
        arguments,
        text[close:],
        is_root,
    )


def _closing(text: str, start: int) -> int:
    """Just past the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"no parenthesis closes that of {text[start : start + 80]!r}")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size) for size in dims.split(",") if size)
    order, _, rest = layout.partition(":")
    minor_first = [sizes[int(axis)] for axis in order.split(",") if axis] or list(reversed(sizes))
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        padding = [int(size) for size in reversed(tile[1].split(","))]
        minor_first += [1] * (len(padding) - len(minor_first))
        padding += [1] * (len(minor_first) - len(padding))
        minor_first = [-(-size // unit) * unit for size, unit in zip(minor_first, padding, strict=True)]
    bits = int(re.search(r"\d+|$", dtype)[0] or {"pred": 8}.get(dtype, 0))
    in_hbm = not re.search(r"S\([1-9]\d*\)", rest)
    return Shape(f"{dtype}[{dims}]", sizes, math.prod(minor_first) * bits // 8, in_hbm)
