"""Arithmetic and traffic of a compiled program, counted in its text. Loops are multiplied out.

All figures are for one device and one call of the program. The traffic of each instruction is an upper bound: the compiler may keep
more on the chip than its text says.

The compiler divides a collective over several slices into two: one inside each slice, over links, and one between the devices of
the same position in all slices, over the network. The latter is a `send` to the host and a `recv`, whose attributes name the kind:

    %send = (f32[8,128]{1,0}, u32[], token[]) send(%x, %after), is_host_transfer=true,
      frontend_attributes={...,_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from metaembed_jax.planning.hlo import Computation, Instruction, Module, parse
from metaembed_jax.planning.instruction_flops import flops, lacks_estimate
from metaembed_jax.planning.traffic import buffers, traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LARGEST = 5
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class CostItem(NamedTuple):
    """A temporary array, or all calls of one collective.

    Attributes:
      bytes: size of the array; for a collective, bytes that a device sends in all calls.
      what: type and sizes of the array; for a collective, its kind and operand, with "between slices" if it crosses them.
      times: how often it is made.
      op_name: the operation of the Python program.
    """

    bytes: float
    what: str
    times: float
    op_name: str


class Cost(NamedTuple):
    """Arithmetic and traffic of one device.

    Attributes:
      flops: FLOPs of matrix products and convolutions, and the estimates of custom kernels.
      hbm_bytes: read from and written to HBM.
      ici_bytes: sent to other devices of the slice, by kind of collective, for rings.
      dcn_bytes: sent to other slices, counted in the same way.
      unknown: custom kernels without an estimate, and loops of unknown length, which count as one turn.
      temporaries, collectives: the largest.
    """

    flops: float
    hbm_bytes: float
    ici_bytes: dict[str, float]
    dcn_bytes: dict[str, float]
    unknown: tuple[str, ...]
    temporaries: list[CostItem]
    collectives: list[CostItem]


def count(text: str, devices: int, branches: Sequence[float] = (), slices: int = 1) -> Cost:
    """Count the cost of a program.

    Args:
      text: result of `jax.stages.Compiled.as_text()`.
      devices: the number of devices.
      branches: how often each branch of a conditional runs, as shares of 1. In a conditional with another number of branches, all
        run equally often.
      slices: the number of slices.
    """
    module = parse(text)
    counter = _Counter(module, devices, branches, slices)
    counter.add(module.computations[module.entry], 1.0)
    return counter.cost()


class _Counter:
    """Sums over the computations of a program."""

    def __init__(self, module: Module, devices: int, branches: Sequence[float], slices: int):
        self._module, self._devices, self._branches, self._slices = module, devices, branches, slices
        self._flops = self._hbm = 0.0
        self._ici: dict[str, float] = defaultdict(float)
        self._dcn: dict[str, float] = defaultdict(float)
        self._collectives: dict[tuple[str, float, str], float] = defaultdict(float)
        self._temporaries: dict[tuple[str, str], CostItem] = {}
        self._unknown: set[str] = set()

    def cost(self) -> Cost:
        """Return the sums."""
        collectives = [CostItem(size, *description) for description, size in self._collectives.items()]
        temporaries, collectives = (sorted(x, reverse=True)[:LARGEST] for x in (self._temporaries.values(), collectives))
        return Cost(
            self._flops, self._hbm, dict(self._ici), dict(self._dcn), tuple(sorted(self._unknown)), temporaries, collectives
        )

    def add(self, computation: Computation, times: float, channels: set[str] | None = None) -> None:
        """Add a computation that runs `times`.

        Args:
          channels: inside a fusion, the collectives that are counted already; None outside fusions.
        """
        is_fused, channels = channels is not None, set() if channels is None else channels
        for instruction in computation.values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            self._flops += times * flops(computation, instruction)
            if lacks_estimate(instruction):
                self._unknown.add(_kernel_name(instruction))
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                self._add_collective(computation, instruction, times, channels if is_fused else set())
            if instruction.opcode == "send" and (kind := _TRANSFER.search(instruction.attributes)):
                self._add_transfer(computation, instruction, times, kind[1].lower().replace("_", "-"))
            for body, share in self._bodies(instruction):
                self.add(body, times * share, channels if is_fused or instruction.opcode == "fusion" else None)
            if not is_fused:
                self._hbm += times * traffic(self._module, computation, instruction)
                for shape in buffers(self._module, instruction):
                    item = CostItem(shape.bytes, shape.text, times, instruction.op_name)
                    self._temporaries[shape.text, instruction.op_name] = item

    def _bodies(self, instruction: Instruction) -> list[tuple[Computation, float]]:
        """Return the computations that an instruction runs, and how often."""
        if instruction.opcode == "while":
            return [(self._called(instruction, "body")[0], self._turns(instruction))]
        if instruction.opcode == "conditional":
            branches = self._called(instruction, "branch_computations")
            branches = branches or self._called(instruction, "false_computation") + self._called(instruction, "true_computation")
            equal = [1 / len(branches)] * len(branches)
            return list(zip(branches, self._branches if len(self._branches) == len(branches) else equal, strict=True))
        if instruction.opcode in ("fusion", "call", "async-start"):
            return [(body, 1) for body in self._called(instruction, "calls") + self._called(instruction, "to_apply")]
        return []

    def _turns(self, loop: Instruction) -> int:
        """Return the turns of a loop: the compiler's note, or else the bound of its counter, which starts from 0."""
        if note := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(note[1])
        (condition,) = self._called(loop, "condition")
        computations = [condition, *(body for instruction in condition.values() for body, _ in self._bodies(instruction))]
        bounds = [
            int(instruction.arguments)
            for computation in computations
            for instruction in computation.values()
            if instruction.opcode == "constant" and instruction.arguments.isdigit()
        ]
        if not bounds:
            self._unknown.add(loop.op_name)
        return math.ceil(max(bounds, default=1) / self._stride(condition, self._called(loop, "body")[0]))

    def _stride(self, condition: Computation, body: Computation) -> int:
        """Return the increment of a loop's counter: more than 1 if the compiler merged several turns."""
        for instruction in condition.values():
            if instruction.opcode == "get-tuple-element" and body.root.opcode == "tuple":
                (index,) = re.findall(r"index=(\d+)", instruction.attributes)
                step = body[body.root.operands[int(index)]]
                increments = [body[name].arguments for name in step.operands if body[name].opcode == "constant"]
                if step.opcode == "add" and increments:
                    return int(increments[0])
        return 1

    def _called(self, instruction: Instruction, attribute: str) -> list[Computation]:
        return [self._module.computations[name] for name in instruction.called(attribute)]

    def _add_collective(self, computation: Computation, instruction: Instruction, times: float, channels: set[str]) -> None:
        # A collective that overlaps with arithmetic is in the fusions of all of it, each time with its channel.
        channel = re.search(r"channel_id=\d+", instruction.attributes)
        if channel and channel[0] in channels:
            return
        channels.add(channel[0] if channel else "")
        kind, group = instruction.opcode.removesuffix("-start"), _group_size(instruction.attributes, self._devices // self._slices)
        operands = [shape for name in instruction.operands for shape in computation[name].shapes]
        sent = times * _sent(kind, sum(shape.bytes for shape in operands), group)
        self._ici[kind] += sent
        self._collectives[f"{kind} {' '.join(shape.text for shape in operands)}", times, instruction.op_name] += sent

    def _add_transfer(self, computation: Computation, send: Instruction, times: float, kind: str) -> None:
        """Add what a collective sends between slices."""
        operand = computation[send.operands[0]]
        sent = times * _sent(kind, operand.bytes, self._slices)
        self._dcn[kind] += sent
        self._collectives[f"{kind} between slices {operand.shapes[0].text}", times, operand.op_name] += sent


def _kernel_name(call: Instruction) -> str:
    """Return the name of a Pallas kernel, if `op_name` ends with it; else all of `op_name`."""
    return re.sub(r".*?([^/]+)/pallas_call", r"\1", call.op_name)


def _sent(kind: str, operand: int, group: int) -> float:
    """Return the bytes that a device sends in a collective of `group` devices, whose operands have `operand` bytes each."""
    if kind == "all-gather":
        return operand * (group - 1)
    if kind == "all-reduce":
        return 2 * operand * (group - 1) / group
    return operand * (group - 1) / group if kind in ("reduce-scatter", "all-to-all") else operand


def _group_size(attributes: str, devices: int) -> int:
    """Return the number of devices in each group of a collective, from any of the notations of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(counted[1].split(",")[-1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # a part of an axis gives its own size
        return math.prod(int(size) if size else sizes[name] for name, size in axes)
    return devices
