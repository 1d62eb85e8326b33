"""A plan in words."""

from ml_collections import ConfigDict

from metaembed_jax.planning.chips import GIB, Topology
from metaembed_jax.planning.plan import Plan, knob

HELD = "trained frozen optimizer index batch padding temporaries program".split()


def verdict(plan: Plan, config: ConfigDict) -> str:
    """Whether it fits, by how much, and if not, what to do; one line."""
    used = f"{plan.total_bytes / GIB:.2f} of {plan.usable_bytes / GIB:.2f} GiB a device"
    if plan.fits:
        return f"fits: {used}, {plan.spare:.1%} to spare"
    return f"does not fit: {used}, {(plan.total_bytes - plan.usable_bytes) / GIB:.2f} GiB too many; {knob(plan, config)}"


def describe(plan: Plan, config: ConfigDict, where: Topology) -> str:
    """The whole report."""
    rows = [
        ("slice", f"{plan.topology}: {plan.devices} devices, {plan.hosts} hosts"),
        ("mesh", ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) + f"; microbatch {plan.microbatch_size}"),
        ("parameters", ", ".join(f"{number:,} {kind}" for kind, number in plan.parameters.items())),
        ("", ""),
        *((f"{name}", f"{plan.memory[name] / GIB:10.3f} GiB a device") for name in HELD if name in plan.memory),
        ("total", f"{plan.total_bytes / GIB:10.3f} GiB of {plan.usable_bytes / GIB:.2f}: {plan.spare:.1%} to spare"),
        ("", ""),
        *((f"FLOPs {kind}", f"{value:10.3e} over all devices") for kind, value in plan.flops.items()),
    ]
    if plan.temporaries:
        rows.append(("bytes over HBM", f"{plan.hbm_bytes:10.3e} a device"))
        rows += [(f"bytes over ICI, {kind}", f"{value:10.3e} a device") for kind, value in sorted(plan.ici_bytes.items())]
    if plan.missing:
        rows.append(("not counted", plan.missing))
    rows += [
        ("", ""),
        ("at the peaks", ", ".join(f"{name} {value:.4g} s" for name, value in plan.seconds.items())),
        ("bound", f"{plan.seconds[plan.binds]:.4g} s, by {plan.binds}; MFU {plan.mfu:.1%} there (of {where.chip.source})"),
        ("speed", f"{plan.items_per_second:,.1f} {plan.unit} a second"),
    ]
    if plan.calls:
        rows.append(("whole run", f"{plan.calls:,} steps in {plan.hours:,.2f} hours, {plan.chip_hours:,.1f} chip-hours"))
    rows += [("", ""), ("compiled in", f"{plan.compile_seconds:.0f} s")]
    lines = [verdict(plan, config), *(f"{name:26}{text}".rstrip() for name, text in rows)]
    for title, items, unit in (("temporaries", plan.temporaries, "GiB"), ("collectives", plan.collectives, "GiB sent")):
        if items:
            lines += ["", f"largest {title}"]
            lines += [f"{item.bytes / GIB:10.4f} {unit}  {item.what} x {item.times:g}  {item.op_name}" for item in items]
    return "\n".join(lines)


def describe_search(plans: list[Plan]) -> str:
    """Plans of one program that fit, side by side, and the flags of the first, which is the fastest."""
    if not plans:
        return "does not fit: none of the meshes and microbatches tried; take a larger slice, or set config.frozen_dtype=int8"
    flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in plans[0].mesh.items())
    lines = [f"fastest: {flags} --config.microbatch_size={plans[0].microbatch_size}"]
    lines += [
        f"{'mesh (data, fsdp, tensor)':27}{'microbatch':>11}{'GiB':>9}{'spare':>8}{'bound s':>10}{'by':>9}{'MFU':>8}{'items/s':>10}"
    ]
    for plan in plans:
        mesh = ", ".join(str(size) for size in plan.mesh.values())
        lines.append(
            f"{mesh:27}{plan.microbatch_size:11}{plan.total_bytes / GIB:9.2f}{plan.spare:8.1%}"
            f"{plan.seconds[plan.binds]:10.4g}{plan.binds:>9}{plan.mfu:8.1%}{plan.items_per_second:10.1f}"
        )
    return "\n".join(lines)
