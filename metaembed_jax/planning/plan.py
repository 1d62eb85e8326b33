"""What one program of a config needs of a slice, and how fast the slice's published peaks would let it run."""

import dataclasses

from metaembed_jax.chips import GIB
from metaembed_jax.config.run import ModelSettings
from metaembed_jax.planning.cost import Item


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one slice. Bytes and seconds are of one device and one call.

    Attributes:
      devices_per_chip: two only where the cores of a chip are devices of their own.
      rings: by axis of the mesh: hops, step and crossings, as in `links.Ring`.
      rows: of a call, as `programs.Rows`; {} where there are none.
      recompute: the config's.
      parameters: how many, trained and frozen.
      memory: bytes, by what they hold.
      host_bytes: of the host's memory that the loop's batches take.
      usable_bytes: what the compiler lets a program use.
      flops: of all devices: forward, backward and extra as counted in closed form, and compiled, as found in the program.
      hbm_bytes: traffic of memory.
      ici_bytes, dcn_bytes: traffic inside a slice and between slices, by kind of collective.
      seconds: that the peaks allow, for compute, HBM, ICI and, over several slices, DCN.
      items, unit, calls: how many of what a call handles, and how many calls a run is.
      temporaries, collectives: the largest.
      missing: why the compiler's figures are not there, or not all.
      arrays: the largest as traced, over all devices, where nothing was compiled.
    """

    config: str
    what: str
    topology: str
    devices: int
    devices_per_chip: int
    hosts: int
    slices: int
    mesh: dict[str, int]
    rings: dict[str, dict[str, int]]
    rows: dict[str, float]
    recompute: str
    parameters: dict[str, int]
    memory: dict[str, int]
    host_bytes: int
    usable_bytes: int
    flops: dict[str, float]
    hbm_bytes: float
    ici_bytes: dict[str, float]
    dcn_bytes: dict[str, float]
    seconds: dict[str, float]
    peak_flops: float
    items: int
    unit: str
    calls: int
    temporaries: list[Item]
    collectives: list[Item]
    missing: str
    arrays: list[Item]
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
        listed = {key: [item._asdict() for item in getattr(self, key)] for key in ("temporaries", "collectives", "arrays")}
        return dataclasses.asdict(self) | listed | {key: getattr(self, key) for key in derived}


def knob(plan: Plan, model: ModelSettings) -> str:
    """What takes most of the memory, and which key of the config to change."""
    largest = max(plan.memory, key=plan.memory.get)
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    if largest in ("trained", "optimizer", "frozen") and plan.mesh["fsdp"] < plan.devices // plan.slices:
        advice = f"raise config.mesh.fsdp={plan.mesh['fsdp']}"
        if largest == "frozen" and model.frozen_dtype != "int8":
            advice += ", or set config.model.frozen_dtype=int8"
    elif plan.what == "train" and largest == "temporaries" and plan.rows["at_once"] > shards:
        advice = f"set config.rows.microbatch_rows={plan.rows['at_once'] // shards // 2 * shards}"
    elif plan.what == "train" and largest == "temporaries" and plan.recompute != "everything":
        advice = "set config.rows.recompute=everything"
    elif plan.what != "search" and largest in ("temporaries", "batch", "next batch"):
        advice = (
            f"raise config.mesh.tensor={plan.mesh['tensor']}, or lower config.rows.size={plan.rows['tokens'], plan.rows['patches']}"
        )
    else:
        advice = "take a larger slice"
    size = f"largest are {largest} with {plan.memory[largest] / GIB:.2f} GiB"
    if largest == "temporaries" and plan.arrays:
        size += f" (the largest array of all devices is {plan.arrays[0].what}, {plan.arrays[0].op_name})"
    return f"{size}: {advice}"
