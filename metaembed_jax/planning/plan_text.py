"""A plan as text for the terminal."""

from metaembed_jax.chips import GIB, Chip
from metaembed_jax.config.run import ModelSettings
from metaembed_jax.planning.plan import Plan, memory_advice
from metaembed_jax.planning.topology import Topology

MEMORY_ORDER = (
    "trained",
    "frozen",
    "optimizer",
    "index",
    "batch",
    "next batch",
    "padding",
    "temporaries",
)  # of the lines
Lines = list[tuple[str, str]]  # (name, text)
TABLE = "{:27}{:>12}{:>12}{:>12}{:>9}{:>13}{:>9}{:>8}{:>11}"


def verdict(plan: Plan, model: ModelSettings) -> str:
    """Return one line: that the program fits and how much memory is spare, or that it does not fit and what to change."""
    used = f"{plan.total_bytes / GIB:.2f} of {plan.usable_bytes / GIB:.2f} GiB a device"
    if plan.fits:
        return f"fits: {used}, {plan.spare:.1%} to spare"
    return f"does not fit: {used}, {(plan.total_bytes - plan.usable_bytes) / GIB:.2f} GiB too many; {memory_advice(plan, model)}"


def describe(plan: Plan, model: ModelSettings, topology: Topology) -> str:
    """Return the whole report; the verdict comes first."""
    sections = [_program(plan, topology.chip), _memory(plan), _work(plan), _speed(plan)]
    named = (("temporaries", plan.temporaries), ("collectives", plan.collectives), ("arrays, of all devices", plan.arrays))
    for title, items in named:
        lines = [f"{amount(item.bytes)}  {item.what:.100} x {item.times:g}  {item.op_name}" for item in items]
        sections.append([("" if number else f"largest {title}", line) for number, line in enumerate(lines)])
    texts = ("\n".join(f"{name:30}{text}" for name, text in lines) for lines in sections if lines)
    return "\n\n".join([verdict(plan, model), *texts])


def _program(plan: Plan, chip: Chip) -> Lines:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    per_chip = "" if chip.devices == 1 else f", {chip.devices} to a chip"
    rates = f"HBM {chip.hbm_bandwidth / 1e9:,.0f} GB/s, ICI {chip.ici_bandwidth / 1e9:,.0f} GB/s both ways"
    if plan.slices > 1:
        rates += f", DCN {chip.dcn_bandwidth / 1e9:.4g} GB/s each way"
    return [
        ("program", f"{plan.what} of {plan.config}, compiled in {plan.compile_seconds:.0f} s"),
        ("slice", f"{plan.topology}: {plan.devices} devices{per_chip}, {plan.hosts} hosts"),
        ("chip", f"{amount(chip.hbm_bytes).strip()}, {chip.flops / 1e12:,.0f} TFLOP/s, {rates} ({chip.source})"),
        ("mesh", mesh),
        *([("call", plan.details)] if plan.details else []),
        *_rows(plan),
        ("rings", "; ".join(_ring(axis, ring) for axis, ring in plan.rings.items() if plan.mesh[axis] > 1) or "none"),
        ("parameters", ", ".join(f"{number:,} {kind}" for kind, number in plan.parameters.items())),
    ]


def _rows(plan: Plan) -> Lines:
    if not plan.rows:
        return []
    rows, at_once, patches = (plan.rows[key] for key in ("rows", "at_once", "patches"))
    capacity, used = f"{plan.rows['tokens']} tokens", f"{plan.rows['used_tokens']:.1%} of tokens"
    if patches:
        capacity, used = f"{capacity}, {patches} patches", f"{used} and {plan.rows['used_patches']:.1%} of patches"
    text = f"{rows} of {capacity}, {plan.rows['vectors']} vectors"
    if plan.what == "train":
        text += f"; {at_once} at once, recompute={plan.recompute}"
    return [("rows", text), ("", f"items of typical sizes, not of your data, use {used}")]


def _ring(axis: str, ring: dict[str, int]) -> str:
    crossings = f", {ring['crossings']} steps between slices" if ring["crossings"] else ""
    return f"{axis} {ring['hops']} hops, at most {ring['step']} a step{crossings}"


def _memory(plan: Plan) -> Lines:
    lines = [(name, f"{amount(plan.memory[name])} a device") for name in MEMORY_ORDER if name in plan.memory]
    usable = amount(plan.usable_bytes).strip()
    if plan.host_bytes:
        lines.append(("in the host's memory", f"{amount(plan.host_bytes)} a device, of two batches"))
    return [*lines, ("total", f"{amount(plan.total_bytes)} of {usable} that a program may use, {plan.spare:.1%} to spare")]


def _work(plan: Plan) -> Lines:
    lines = [(f"FLOPs {kind}", f"{value:10.4g}") for kind, value in plan.flops.items() if value]
    if extra := plan.flops["extra"]:
        useful = plan.flops["forward"] + plan.flops["backward"]
        lines.append(
            ("", f"{useful / (useful + extra):10.1%} is the largest possible MFU, since the rest is recomputed or for rotations")
        )
    if plan.hbm_bytes:
        lines.append(("bytes over HBM", f"{amount(plan.hbm_bytes)} a device"))
    if plan.index_bytes:
        share = f"; the search moves {plan.hbm_bytes / plan.index_bytes:.4f} x that" if plan.hbm_bytes else ""
        lines.append(("floor, all vectors once", f"{amount(plan.index_bytes)} a device{share}"))
    for network, sent in (("ICI", plan.ici_bytes), ("DCN", plan.dcn_bytes)):
        lines += [(f"bytes over {network}, {kind}", f"{amount(value)} a device") for kind, value in sorted(sent.items())]
    return lines + ([("not counted", plan.missing)] if plan.missing else [])


def _speed(plan: Plan) -> Lines:
    bound = plan.seconds[plan.binds]
    lines = [
        ("at the peaks", ", ".join(f"{name} {value:.4g} s" for name, value in plan.seconds.items())),
        ("bound", f"{bound:.4g} s, by {plan.binds}: MFU {plan.mfu:.1%}, {plan.items_per_second:,.1f} {plan.unit} a second"),
    ]
    if plan.calls:
        lines.append(("whole run", f"{plan.calls:,} steps, {plan.hours:,.2f} hours, {plan.chip_hours:,.1f} chip-hours"))
    return lines


def describe_search(plans: list[Plan]) -> str:
    """Return a table of plans that fit, and the flags of the first, which is the fastest."""
    if not plans:
        return (
            "does not fit with any mesh, microbatch and recompute that was tried; "
            "take a larger slice, or set config.model.frozen_dtype=int8"
        )
    flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in plans[0].mesh.items())
    flags += f" --config.rows.microbatch_rows={plans[0].rows['at_once']} --config.rows.recompute={plans[0].recompute}"
    lines = [f"fastest: {flags}", ""]
    lines.append(
        TABLE.format("mesh (data, fsdp, tensor)", "rows at once", "recompute", "a device", "spare", "bound", "by", "MFU", "pairs/s")
    )
    for plan in plans:
        mesh, bound = ", ".join(str(size) for size in plan.mesh.values()), f"{plan.seconds[plan.binds]:.4g} s"
        rates = f"{plan.mfu:.1%}", f"{plan.items_per_second:,.1f}"
        size = amount(plan.total_bytes)
        lines.append(TABLE.format(mesh, plan.rows["at_once"], plan.recompute, size, f"{plan.spare:.1%}", bound, plan.binds, *rates))
    return "\n".join(lines)


def amount(size: float) -> str:
    """Return bytes with a unit, 10 characters wide."""
    power = next(power for power in range(5) if size < 1024 ** (power + 1) or power == 4)
    return f"{size / 1024**power:7.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
