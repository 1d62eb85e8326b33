"""Plan a program of a config on a slice: compile it, and count its memory, FLOPs and traffic."""

import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from metaembed_jax.backbones.family import family
from metaembed_jax.batch.items import Size
from metaembed_jax.chips import Chip
from metaembed_jax.config.run import ModelSettings, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.links import rings
from metaembed_jax.network_config import architecture_of
from metaembed_jax.planning.compiling import compile_program
from metaembed_jax.planning.cost import Cost, CostItem, count
from metaembed_jax.planning.plan import Plan
from metaembed_jax.planning.programs import PROGRAMS, Program, train_program
from metaembed_jax.planning.topology import Topology
from metaembed_jax.planning.traced import largest_arrays
from metaembed_jax.sharding import shard_bytes
from metaembed_jax.training.step import run_mesh

NO_COST = Cost(0.0, 0.0, {}, {}, (), [], [])
HELD_BATCHES = 2  # the training loop holds the batch of the current step, and the next
_OUT_OF_MEMORY = re.compile(r"required[^()]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of")


def make_plan(config: RunConfig, what: str, slices: Topology, make: Callable[[RunConfig, Mesh], Program] | None = None) -> Plan:
    """Compile a program of a config for some slices, and measure it.

    Args:
      what: a key of `PROGRAMS`, or a name for the program that `make` makes.
      make: makes a program that is not in `PROGRAMS`, such as a search.

    Raises:
      UserError: mesh, batch and slices do not fit each other.
    """
    mesh = run_mesh(config, slices.devices)
    make = make or PROGRAMS[what]
    program = make(config, mesh)
    start = time.perf_counter()
    memory, cost, missing, arrays = _measure(config, make, slices, program, mesh)
    return Plan(
        config=config.name,
        what=what,
        topology=slices.name,
        devices=mesh.size,
        devices_per_chip=slices.chip.devices,
        hosts=slices.hosts,
        slices=slices.slices,
        mesh=dict(mesh.shape),
        rings={axis: ring._asdict() for axis, ring in rings(mesh).items()},
        rows=program.rows._asdict() if program.rows else {},
        details=program.details,
        recompute=config.rows.recompute,
        parameters={name: _numbers(program.arguments.get(name)) for name in ("trained", "frozen")},
        memory=memory,
        host_bytes=HELD_BATCHES * shard_bytes(program.arguments["batch"], in_host=True),
        usable_bytes=int(slices.chip.usable_bytes),
        flops=program.flops._asdict() | ({"compiled": cost.flops * mesh.size} if cost.flops else {}),
        hbm_bytes=cost.hbm_bytes,
        index_bytes=program.index_bytes,
        ici_bytes=cost.ici_bytes,
        dcn_bytes=cost.dcn_bytes,
        seconds=_seconds(sum(program.flops) / mesh.size, cost, slices.chip),
        peak_flops=slices.chip.flops / slices.chip.devices,
        items=program.items,
        unit=program.unit,
        calls=program.calls,
        temporaries=cost.temporaries,
        collectives=cost.collectives,
        missing=missing,
        arrays=list(arrays),
        compile_seconds=time.perf_counter() - start,
    )


class _Measured(NamedTuple):
    """Measurements of a compiled program; of a program that the compiler refuses, those that do not need it.

    Attributes:
      memory: bytes of a device, by content.
      cost: cost of a device; zeros if the program is refused.
      missing: as in `Plan`.
      arrays: the largest traced arrays of a program that is refused.
    """

    memory: dict[str, int]
    cost: Cost
    missing: str = ""
    arrays: Sequence[CostItem] = ()


def _measure(config: RunConfig, make: Callable, slices: Topology, program: Program, mesh: Mesh) -> _Measured:
    held = {name: shard_bytes(tree) for name, tree in program.arguments.items()}
    waiting = {"next batch": (HELD_BATCHES - 1) * held["batch"]} if make is train_program else {}
    compiled = compile_program(make, config, slices.name)
    if compiled.error:
        required = _OUT_OF_MEMORY.search(compiled.error)
        if not required:
            raise UserError(f"the TPU compiler failed on this program: {' '.join(compiled.error.split())[:2000]}")
        number, unit = required[1] or required[3], required[2] or required[4]
        needed = int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))
        with jax.set_mesh(mesh):
            arrays = largest_arrays(program.trace().jaxpr)
        memory = held | waiting | {"temporaries": needed - sum(held.values())}
        return _Measured(memory, NO_COST, "the compiled program: the compiler refused it", arrays)
    padding = max(compiled.arguments - sum(held.values()), 0)
    memory = held | waiting | {"padding": padding, "temporaries": compiled.temporaries}
    cost = count(compiled.text, mesh.size, branch_shares(config.model), slices.slices)
    return _Measured(memory, cost, f"all FLOPs of {', '.join(cost.unknown)}" if cost.unknown else "")


def _seconds(flops: float, cost: Cost, chip: Chip) -> dict[str, float]:
    """Return the time that one device takes for each resource, at its peak.

    Args:
      flops: FLOPs of one device in closed form, used if the compiler's are not complete.
    """
    computed = cost.flops if cost.flops and not cost.unknown else max(flops, cost.flops)
    seconds = {"compute": computed * chip.devices / chip.flops}
    if cost.hbm_bytes:
        seconds["HBM"] = cost.hbm_bytes * chip.devices / chip.hbm_bandwidth
        # The published figure has both directions of the links; a device sends in one of them.
        seconds["ICI"] = sum(cost.ici_bytes.values()) * chip.devices / (chip.ici_bandwidth / 2)
    if cost.dcn_bytes:
        seconds["DCN"] = sum(cost.dcn_bytes.values()) * chip.devices / chip.dcn_bandwidth
    return seconds


def branch_shares(model: ModelSettings) -> tuple[float, ...]:
    """Return how often each branch of a conditional runs, as shares of 1; empty for a model without conditionals.

    The only conditionals choose the kind of attention in a layer of a stack.
    """
    architecture = architecture_of(model)
    row = Size(1, architecture.layout.multiple, 1)
    stacks = [stack for stack in family(model.backbone).flop_counts(architecture, row) if stack.scanned]
    for path in dict.fromkeys(stack.path for stack in stacks):
        layers = [attention.layers for stack in stacks if stack.path == path for attention in stack.attention]
        if len(layers) > 1:
            return tuple(number / sum(layers) for number in layers)
    return ()


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
