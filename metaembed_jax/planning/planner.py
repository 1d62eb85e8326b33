"""From a config and a slice to a plan: compiles the program and reads what the compiler made of it."""

import re
import time
from collections.abc import Sequence
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
from metaembed_jax.planning.cost import Cost, Item, count
from metaembed_jax.planning.plan import Plan
from metaembed_jax.planning.programs import PROGRAMS, Program
from metaembed_jax.planning.topology import Topology
from metaembed_jax.planning.traced import largest_arrays
from metaembed_jax.sharding import shard_bytes
from metaembed_jax.training.step import run_mesh

UNKNOWN = Cost(0.0, 0.0, {}, {}, (), [], [])
HELD_BATCHES = 2  # by the loop of training: that of the step that is computed, and the next
_OUT_OF_MEMORY = re.compile(r"required[^()]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of")


def make_plan(config: RunConfig, what: str, where: Topology) -> Plan:
    """Compiles a program of a checked config for a slice, and measures it.

    Raises:
      UserError: mesh, batch and slice do not fit each other.
    """
    mesh = run_mesh(config, where.devices)
    program = PROGRAMS[what](config, mesh)
    began = time.perf_counter()
    memory, cost, missing, arrays = _measure(config, what, where, program, mesh)
    return Plan(
        config=config.name,
        what=what,
        topology=where.name,
        devices=mesh.size,
        devices_per_chip=where.chip.devices,
        hosts=where.hosts,
        slices=where.slices,
        mesh=dict(mesh.shape),
        rings={axis: ring._asdict() for axis, ring in rings(mesh).items()},
        rows=program.rows._asdict() if program.rows else {},
        recompute=config.rows.recompute,
        parameters={name: _numbers(program.arguments.get(name)) for name in ("trained", "frozen")},
        memory=memory,
        host_bytes=HELD_BATCHES * shard_bytes(program.arguments["batch"], in_host=True),
        usable_bytes=int(where.chip.usable_bytes),
        flops=program.flops._asdict() | ({"compiled": cost.flops * mesh.size} if cost.flops else {}),
        hbm_bytes=cost.hbm_bytes,
        ici_bytes=cost.ici_bytes,
        dcn_bytes=cost.dcn_bytes,
        seconds=_seconds(sum(program.flops) / mesh.size, cost, where.chip),
        peak_flops=where.chip.flops / where.chip.devices,
        items=program.items,
        unit=program.unit,
        calls=program.calls,
        temporaries=cost.temporaries,
        collectives=cost.collectives,
        missing=missing,
        arrays=list(arrays),
        compile_seconds=time.perf_counter() - began,
    )


class _Measured(NamedTuple):
    """What the compiler says.

    Attributes:
      memory: bytes of a device, by what they hold.
      cost: zeros where it is not known.
      missing: what the cost lacks, and why.
      arrays: the largest, as traced, where the program does not fit.
    """

    memory: dict[str, int]
    cost: Cost
    missing: str = ""
    arrays: Sequence[Item] = ()


def _measure(config: RunConfig, what: str, where: Topology, program: Program, mesh: Mesh) -> _Measured:
    held = {name: shard_bytes(tree) for name, tree in program.arguments.items()}
    beside = {"next batch": (HELD_BATCHES - 1) * held["batch"]} if what == "train" else {}
    compiled = compile_program(PROGRAMS[what], config, where.name)
    if compiled.error:
        found = _OUT_OF_MEMORY.search(compiled.error)
        if not found:
            raise UserError(f"the TPU compiler failed on this program: {' '.join(compiled.error.split())[:2000]}")
        number, unit = found[1] or found[3], found[2] or found[4]
        needed = int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))
        with jax.set_mesh(mesh):
            arrays = largest_arrays(program.trace().jaxpr)
        memory = held | beside | {"temporaries": needed - sum(held.values())}
        return _Measured(memory, UNKNOWN, "what was compiled, which is nothing", arrays)
    memory = held | beside | {"padding": max(compiled.arguments - sum(held.values()), 0), "temporaries": compiled.temporaries}
    cost = count(compiled.text, mesh.size, branches(config.model), where.slices)
    return _Measured(memory, cost, f"all FLOPs of {', '.join(cost.unknown)}" if cost.unknown else "")


def _seconds(flops: float, cost: Cost, chip: Chip) -> dict[str, float]:
    """What one device needs for each part of the work at its peak.

    Args:
      flops: of one device, counted in closed form; they stand in for what the compiler does not know.
    """
    done = cost.flops if cost.flops and not cost.unknown else max(flops, cost.flops)
    seconds = {"compute": done * chip.devices / chip.flops}
    if cost.hbm_bytes:
        seconds["HBM"] = cost.hbm_bytes * chip.devices / chip.hbm_bandwidth
        # What a device sends goes in one of the two directions that are published as one figure.
        seconds["ICI"] = sum(cost.ici_bytes.values()) * chip.devices / (chip.ici_bandwidth / 2)
    if cost.dcn_bytes:
        seconds["DCN"] = sum(cost.dcn_bytes.values()) * chip.devices / chip.dcn_bandwidth
    return seconds


def branches(model: ModelSettings) -> tuple[float, ...]:
    """How often each branch of a conditional runs: the only ones there are choose the kind of attention in a layer of a stack."""
    architecture = architecture_of(model)
    row = Size(1, architecture.layout.multiple, 1)
    parts = [part for part in family(model.backbone).flop_counts(architecture, row) if part.scanned]
    for part in parts:
        kinds = [one.layers for other in parts if other.path == part.path for one in other.attention]
        if len(kinds) > 1:
            return tuple(layers / sum(kinds) for layers in kinds)
    return ()


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
