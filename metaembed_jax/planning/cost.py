"""What a compiled program does, counted in its text: arithmetic, traffic to HBM and between chips. Loops are multiplied out.

Everything is of one device and one call of the program. Traffic is what `traffic` says of each instruction, so it is an upper
bound where the compiler keeps on the chip what its text does not say.

The compiler divides a collective over several slices in two: one inside each slice, over links, and one between the devices of the
same position in all slices, over the network. The latter is a `send` to the host and a `recv`, whose attributes name the kind:

    %send = (f32[8,128]{1,0}, u32[], token[]) send(%x, %after), is_host_transfer=true,
      frontend_attributes={...,_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from metaembed_jax.planning.hlo import Computation, Instruction, Module, parse
from metaembed_jax.planning.instruction_flops import flops, is_silent
from metaembed_jax.planning.traffic import buffers, traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LARGEST = 5


class Item(NamedTuple):
    """A temporary array, or all calls of one collective.

    Attributes:
      bytes: of the array; or that a device sends, over all calls.
      what: its type and sizes; of a collective, its kind and operand, with "between slices" if it is one.
      times: how often it is made.
      op_name: where in the Python program it comes from.
    """

    bytes: float
    what: str
    times: float
    op_name: str


class Cost(NamedTuple):
    """Of one device.

    Attributes:
      flops: of matrix products and convolutions, and what custom kernels state of themselves.
      hbm_bytes: read from and written to HBM.
      ici_bytes: that it sends to other devices of its slice, by kind of collective, done as a ring.
      dcn_bytes: that it sends to other slices, counted in the same way.
      unknown: custom kernels that do not state their FLOPs, and loops without a known end, which count as one turn.
      temporaries, collectives: the largest.
    """

    flops: float
    hbm_bytes: float
    ici_bytes: dict[str, float]
    dcn_bytes: dict[str, float]
    unknown: tuple[str, ...]
    temporaries: list[Item]
    collectives: list[Item]


def count(text: str, devices: int, branches: Sequence[float] = (), slices: int = 1) -> Cost:
    """Counts a program.

    Args:
      text: of `Compiled.as_text()`.
      devices: that it runs on.
      branches: how often each branch of a conditional runs, as shares of 1. Conditionals with another number of branches count
        all of them alike often.
      slices: that it runs on.
    """
    module = parse(text)
    counter = _Counter(module, devices, branches, slices)
    counter.walk(module.computations[module.entry], 1.0)
    return counter.cost()


class _Counter:
    def __init__(self, module: Module, devices: int, branches: Sequence[float], slices: int):
        self._module, self._devices, self._branches, self._slices = module, devices, branches, slices
        self._flops = self._hbm = 0.0
        self._ici, self._dcn, self._collectives, self._unknown = Counter(), Counter(), Counter(), set()
        self._temporaries: dict[tuple[str, str], Item] = {}

    def cost(self) -> Cost:
        collectives = [Item(size, *about) for about, size in self._collectives.items()]
        temporaries, collectives = (sorted(x, reverse=True)[:LARGEST] for x in (self._temporaries.values(), collectives))
        return Cost(
            self._flops, self._hbm, dict(self._ici), dict(self._dcn), tuple(sorted(self._unknown)), temporaries, collectives
        )

    def walk(self, computation: Computation, times: float, channels: set[str] | None = None) -> None:
        """Adds a computation that runs `times`.

        Args:
          channels: inside of a fusion, the collectives that were met in fusions beside it.
        """
        is_fused, channels = channels is not None, set() if channels is None else channels
        for one in computation.values():
            if one.opcode.endswith(("-done", "-update")):
                continue
            self._flops += times * flops(computation, one)
            if is_silent(one):
                self._unknown.add(_kernel_name(one))
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                self._collective(computation, one, times, channels if is_fused else set())
            if one.opcode == "send" and (kind := _TRANSFER.search(one.attributes)):
                self._between_slices(computation, one, times, kind[1].lower().replace("_", "-"))
            for body, share in self._bodies(one):
                self.walk(body, times * share, channels if is_fused or one.opcode == "fusion" else None)
            if not is_fused:
                self._hbm += times * traffic(self._module, computation, one)
                for shape in buffers(self._module, one):
                    self._temporaries[shape.text, one.op_name] = Item(shape.bytes, shape.text, times, one.op_name)

    def _bodies(self, one: Instruction) -> list[tuple[Computation, float]]:
        """What an instruction runs, and how often."""
        if one.opcode == "while":
            return [(self._called(one, "body")[0], self._turns(one))]
        if one.opcode == "conditional":
            branches = self._called(one, "branch_computations")
            branches = branches or self._called(one, "false_computation") + self._called(one, "true_computation")
            alike = [1 / len(branches)] * len(branches)
            return list(zip(branches, self._branches if len(self._branches) == len(branches) else alike, strict=True))
        if one.opcode in ("fusion", "call", "async-start"):
            return [(body, 1) for body in self._called(one, "calls") + self._called(one, "to_apply")]
        return []

    def _turns(self, loop: Instruction) -> int:
        """Of a loop: what the compiler noted, else from the bound that its counter, which starts from 0, is compared with."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(noted[1])
        (condition,) = self._called(loop, "condition")
        parts = [condition, *(body for one in condition.values() for body, _ in self._bodies(one))]
        constants = [one.arguments for part in parts for one in part.values() if one.opcode == "constant"]
        bounds = [int(text) for text in constants if text.isdigit()]
        if not bounds:
            self._unknown.add(loop.op_name)
        return math.ceil(max(bounds, default=1) / self._stride(condition, self._called(loop, "body")[0]))

    def _stride(self, condition: Computation, body: Computation) -> int:
        """What each turn adds to the counter: more than 1 where the compiler has put several turns into one."""
        for one in condition.values():
            if one.opcode == "get-tuple-element" and body.root.opcode == "tuple":
                step = body[body.root.operands[int(re.search(r"index=(\d+)", one.attributes)[1])]]
                added = [body[name].arguments for name in step.operands if body[name].opcode == "constant"]
                if step.opcode == "add" and added:
                    return int(added[0])
        return 1

    def _called(self, one: Instruction, attribute: str) -> list[Computation]:
        return [self._module.computations[name] for name in one.called(attribute)]

    def _collective(self, computation: Computation, one: Instruction, times: float, channels: set[str]) -> None:
        # One that runs beside others' arithmetic is in the fusions of all of them, always with its channel.
        channel = re.search(r"channel_id=\d+", one.attributes)
        if channel and channel[0] in channels:
            return
        channels.add(channel[0] if channel else "")
        kind, group = one.opcode.removesuffix("-start"), _group_size(one.attributes, self._devices // self._slices)
        operands = [shape for name in one.operands for shape in computation[name].shapes]
        sent = times * _sent(kind, sum(shape.bytes for shape in operands), group)
        self._ici[kind] += sent
        self._collectives[f"{kind} {' '.join(shape.text for shape in operands)}", times, one.op_name] += sent

    def _between_slices(self, computation: Computation, send: Instruction, times: float, kind: str) -> None:
        operand = computation[send.operands[0]]
        sent = times * _sent(kind, operand.bytes, self._slices)
        self._dcn[kind] += sent
        self._collectives[f"{kind} between slices {operand.shapes[0].text}", times, operand.op_name] += sent


def _kernel_name(call: Instruction) -> str:
    """Return the name that a Pallas kernel was given, where `op_name` ends with it; else all of `op_name`."""
    return re.sub(r".*?([^/]+)/pallas_call", r"\1", call.op_name)


_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _sent(kind: str, operand: int, group: int) -> float:
    """Returns the bytes that a device sends in a collective of `group` devices whose operands have `operand` bytes each."""
    if kind == "all-gather":
        return operand * (group - 1)
    if kind == "all-reduce":
        return 2 * operand * (group - 1) / group
    return operand * (group - 1) / group if kind in ("reduce-scatter", "all-to-all") else operand


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in a collective together, in any of the notations of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(counted[1].split(",")[-1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # a part of an axis gives its own size
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return devices
