"""A plan: what one program of a config needs of a slice, and how fast the slice's published peaks would let it run."""

import dataclasses
import math
import re
import time

import jax
from ml_collections import ConfigDict

from metaembed_jax.config import check_config, model_config
from metaembed_jax.errors import UserError
from metaembed_jax.planning.chips import GIB, Topology
from metaembed_jax.planning.cost import Cost, Item, count
from metaembed_jax.planning.programs import PROGRAMS, Program
from metaembed_jax.training.start import stages
from metaembed_jax.training.step import run_mesh

_OUT_OF_MEMORY = re.compile(r"required[^()]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one slice. Bytes and seconds are of one device and one call.

    Attributes:
      devices_per_chip: two only where the cores of a chip are devices of their own.
      parameters: how many, trained and frozen.
      memory: bytes, by what they hold.
      usable_bytes: what the compiler lets a program use.
      flops: of all devices: forward, backward and recomputed as counted in closed form, and compiled, as found in the program.
      hbm_bytes, ici_bytes: traffic; the latter by kind of collective.
      seconds: that the peaks allow, for compute, HBM and ICI.
      items, unit, calls: how many of what a call handles, and how many calls a run is.
      temporaries, collectives: the largest.
      missing: why the compiler's figures are not there, or not all.
    """

    config: str
    what: str
    topology: str
    devices: int
    devices_per_chip: int
    hosts: int
    mesh: dict[str, int]
    microbatch_size: int
    parameters: dict[str, int]
    memory: dict[str, int]
    usable_bytes: int
    flops: dict[str, float]
    hbm_bytes: float
    ici_bytes: dict[str, float]
    seconds: dict[str, float]
    peak_flops: float
    items: int
    unit: str
    calls: int
    temporaries: list[Item]
    collectives: list[Item]
    missing: str
    compile_seconds: float

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has room."""
        return self.total_bytes <= self.usable_bytes

    @property
    def spare(self) -> float:
        """The share of the usable memory that is left; negative where it does not fit."""
        return 1 - self.total_bytes / self.usable_bytes

    @property
    def binds(self) -> str:
        """What takes longest, if each ran at its peak and beside the others."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def mfu(self) -> float:
        """Share of the peak that forward and backward would reach at the bound."""
        useful = self.flops["forward"] + self.flops["backward"]
        return useful / self.devices / self.peak_flops / self.seconds[self.binds]

    @property
    def items_per_second(self) -> float:
        """At the bound, over all devices."""
        return self.items / self.seconds[self.binds]

    @property
    def hours(self) -> float:
        """Of a run, at the bound."""
        return self.calls * self.seconds[self.binds] / 3600

    @property
    def chip_hours(self) -> float:
        """Of a run, at the bound."""
        return self.hours * self.devices / self.devices_per_chip

    def to_json(self) -> dict:
        """All of it, as JSON takes it."""
        derived = ("total_bytes", "fits", "spare", "binds", "mfu", "items_per_second", "hours", "chip_hours")
        listed = {key: [item._asdict() for item in getattr(self, key)] for key in ("temporaries", "collectives")}
        return dataclasses.asdict(self) | listed | {key: getattr(self, key) for key in derived}


def check(config: ConfigDict) -> None:
    """Fills an empty architecture from the stage before, and refuses what cannot be planned.

    Raises:
      UserError: names the key.
    """
    check_config(config)
    if not config.architecture:
        known = [stage.architecture for stage in stages(config) if stage.architecture]
        if not known:
            raise UserError("config.architecture is empty, and plan reads no weights to learn it from: set it in the config")
        with config.unlocked():
            config.architecture = known[-1]


def make_plan(config: ConfigDict, what: str, where: Topology) -> Plan:
    """Compiles a program of a checked config for a slice, and measures it.

    Raises:
      UserError: mesh, batch and slice do not fit each other.
    """
    mesh = run_mesh(config, where.devices)
    program = PROGRAMS[what](config, mesh)
    began = time.perf_counter()
    held = {name: shard_bytes(tree) for name, tree in program.arguments.items()}
    memory, cost, missing = _compile(program, held, mesh.size, _branches(config))
    chip = where.chip
    flops = {"forward": program.flops.forward, "backward": program.flops.backward, "recomputed": program.flops.recomputed}
    done = sum(flops.values()) / mesh.size
    if cost:
        flops["compiled"] = cost.flops * mesh.size
        done = max(done, cost.flops) if cost.silent else cost.flops
        missing = missing or ("no FLOPs are stated by " + ", ".join(cost.silent) if cost.silent else "")
    seconds = {"compute": done * chip.devices / chip.flops}
    if cost:
        seconds["HBM"] = cost.hbm_bytes * chip.devices / chip.hbm_bandwidth
        # A device sends in one of the two directions that are published as one figure.
        seconds["ICI"] = sum(cost.ici_bytes.values()) * chip.devices / (chip.ici_bandwidth / 2)
    return Plan(
        config=config.name,
        what=what,
        topology=where.name,
        devices=mesh.size,
        devices_per_chip=chip.devices,
        hosts=where.hosts,
        mesh=dict(mesh.shape),
        microbatch_size=config.microbatch_size,
        parameters={
            name: sum(leaf.size for leaf in jax.tree.leaves(program.arguments.get(name, {}))) for name in ("trained", "frozen")
        },
        memory=memory,
        usable_bytes=int(chip.usable_bytes),
        flops=flops,
        hbm_bytes=cost.hbm_bytes if cost else 0.0,
        ici_bytes=cost.ici_bytes if cost else {},
        seconds=seconds,
        peak_flops=chip.flops / chip.devices,
        items=program.items,
        unit=program.unit,
        calls=program.calls,
        temporaries=cost.temporaries if cost else [],
        collectives=cost.collectives if cost else [],
        missing=missing,
        compile_seconds=time.perf_counter() - began,
    )


def _compile(program: Program, held: dict[str, int], devices: int, branches: tuple) -> tuple[dict[str, int], Cost | None, str]:
    """(memory of a device, cost, what is missing); no cost where the program does not fit or its text cannot be had."""
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        number, unit = found[1] or found[3], found[2] or found[4]
        needed = int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))
        return held | {"temporaries": needed - sum(held.values())}, None, "the compiler gives none for what does not fit"
    found = compiled.memory_analysis()
    memory = held | {
        "padding": found.argument_size_in_bytes - sum(held.values()),
        "temporaries": found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        return memory, None, f"this libtpu cannot write the program down ({str(error).splitlines()[0]})"
    return memory, count(text, devices, branches), ""


def _branches(config: ConfigDict) -> tuple[float, float]:
    """The only conditional there is chooses between windows and the whole image, for each vision block."""
    vision = model_config(config).architecture.vision_config
    full = len(set(vision.fullatt_block_indexes) & set(range(vision.depth))) / vision.depth
    return 1 - full, full


def shard_bytes(tree) -> int:
    """Of one device's part of abstract arrays, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def knob(plan: Plan, config: ConfigDict) -> str:
    """What takes most of the memory, and which key of the config to change."""
    largest = max(plan.memory, key=plan.memory.get)
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    if largest in ("trained", "optimizer", "frozen") and plan.mesh["fsdp"] < plan.devices:
        advice = f"raise config.mesh.fsdp={plan.mesh['fsdp']}"
        if largest == "frozen" and config.frozen_dtype != "int8":
            advice += ", or set config.frozen_dtype=int8"
    elif plan.what == "train" and largest == "temporaries" and not config.checkpoint_layers:
        advice = "set config.checkpoint_layers=True"
    elif plan.what == "train" and largest == "temporaries" and plan.microbatch_size > shards:
        advice = f"lower config.microbatch_size={plan.microbatch_size}"
    elif plan.what != "search" and largest in ("temporaries", "batch"):
        advice = f"raise config.mesh.tensor={plan.mesh['tensor']}, or shorten config.data.candidate_shapes"
    else:
        advice = "take a larger slice"
    return f"largest are {largest} with {plan.memory[largest] / GIB:.2f} GiB: {advice}"
