"""The memory that one program of a config needs on a slice, and its time at the slice's published peaks."""

import dataclasses

from metaembed_jax.chips import GIB
from metaembed_jax.config.run import ModelSettings
from metaembed_jax.planning.cost import CostItem


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one slice. Bytes and seconds are of one device and one call.

    Attributes:
      what: the program, a key of `programs.PROGRAMS`, or "search".
      devices_per_chip: 2 if the cores of a chip are separate devices, else 1.
      rings: hops, step and crossings of each mesh axis, as in `links.Ring`.
      rows: `programs.CallRows` of a call; empty for a program without rows.
      details: `programs.Program.details`.
      recompute: the config's.
      parameters: numbers of trained and frozen parameters.
      memory: bytes, by content.
      host_bytes: batches of the training loop in the host's memory.
      usable_bytes: the most that the compiler gives to a program.
      flops: FLOPs of all devices: forward, backward and extra in closed form, and compiled as counted in the program.
      hbm_bytes: bytes read from and written to HBM.
      index_bytes: `programs.Program.index_bytes`.
      ici_bytes, dcn_bytes: traffic inside a slice and between slices, by kind of collective.
      seconds: at the peaks: compute, HBM, ICI and, over several slices, DCN.
      items, unit: number and kind of items of a call.
      calls: number of calls in a run.
      temporaries, collectives: the largest ones.
      missing: why the figures of the compiler are incomplete; empty if they are complete.
      arrays: the largest traced arrays over all devices, if the program does not compile.
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
    details: str
    recompute: str
    parameters: dict[str, int]
    memory: dict[str, int]
    host_bytes: int
    usable_bytes: int
    flops: dict[str, float]
    hbm_bytes: float
    index_bytes: float
    ici_bytes: dict[str, float]
    dcn_bytes: dict[str, float]
    seconds: dict[str, float]
    peak_flops: float
    items: int
    unit: str
    calls: int
    temporaries: list[CostItem]
    collectives: list[CostItem]
    missing: str
    arrays: list[CostItem]
    compile_seconds: float

    @property
    def total_bytes(self) -> int:
        """Bytes of all contents."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True if a device has room."""
        return self.total_bytes <= self.usable_bytes

    @property
    def spare(self) -> float:
        """Share of the usable memory that stays free; negative if the program does not fit."""
        return 1 - self.total_bytes / self.usable_bytes

    @property
    def binds(self) -> str:
        """The key of `seconds` that takes longest: the bound, if all overlap."""
        return max(self.seconds, key=lambda key: self.seconds[key])

    @property
    def mfu(self) -> float:
        """Share of the peak that forward and backward reach at the bound."""
        useful = self.flops["forward"] + self.flops["backward"]
        return useful / self.devices / self.peak_flops / self.seconds[self.binds]

    @property
    def items_per_second(self) -> float:
        """Items a second at the bound, over all devices."""
        return self.items / self.seconds[self.binds]

    @property
    def hours(self) -> float:
        """Hours of a run at the bound."""
        return self.calls * self.seconds[self.binds] / 3600

    @property
    def chip_hours(self) -> float:
        """Chip-hours of a run at the bound."""
        return self.hours * self.devices / self.devices_per_chip

    def to_json(self) -> dict:
        """Return all fields and properties for JSON."""
        derived = ("total_bytes", "fits", "spare", "binds", "mfu", "items_per_second", "hours", "chip_hours")
        listed = {key: [item._asdict() for item in getattr(self, key)] for key in ("temporaries", "collectives", "arrays")}
        return dataclasses.asdict(self) | listed | {key: getattr(self, key) for key in derived}


def memory_advice(plan: Plan, model: ModelSettings) -> str:
    """Return the content that takes most of the memory, and the config key that shrinks it."""
    largest = max(plan.memory, key=lambda content: plan.memory[content])
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
