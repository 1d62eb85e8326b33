"""Results as a table of 100 columns, printed line by line, and as JSON."""

import math

from metaembed_jax.check.case import Result
from metaembed_jax.chips import Peak

ROW = "{:6}{:30}{:>8}{:>7}{:>8}{:>9}{:>8}{:>8}{:>5}{:>6}{:>5}"
HEAD = ROW.format("", "", "by", "error", "allowed", "time", "compile", "TFLOP/s", "peak", "GB/s", "peak")


def line(result: Result, devices: int, peak: Peak | None) -> str:
    """Return a line of the table; a problem takes a second line."""
    figures = rates(result, devices, peak)
    row = ROW.format(
        status(result),
        result.name,
        result.implementation,
        "finite" if result.ok and result.error is None else _power(result.error),
        _power(result.tolerance),
        _time(result.seconds),
        "" if result.compile_seconds is None else f"{result.compile_seconds:.1f} s",
        _rate(figures["flops_per_second"], 1e12),
        _share(figures["flops_share"]),
        _rate(figures["bytes_per_second"], 1e9),
        _share(figures["bytes_share"]),
    ).rstrip()
    return row if result.ok else f"{row}\n{'':6}{result.problem[:300]}"


def status(result: Result) -> str:
    """Return "ok", "WRONG" for wrong numbers, or "FAIL" for a case that did not run."""
    return "ok" if result.ok else "WRONG" if result.output else "FAIL"


def rates(result: Result, devices: int, peak: Peak | None) -> dict[str, float | None]:
    """Return the FLOPs and bytes a second of one device, and their shares of the peaks; None for unknown ones."""
    if result.seconds is None:
        return dict.fromkeys(("flops_per_second", "flops_share", "bytes_per_second", "bytes_share"))
    flops, moved = (amount / devices / result.seconds for amount in (result.flops, result.bytes))
    return {
        "flops_per_second": flops,
        "flops_share": flops / peak.flops if peak else None,
        "bytes_per_second": moved,
        "bytes_share": moved / peak.hbm_bandwidth if peak else None,
    }


def to_json(result: Result, devices: int, peak: Peak | None) -> dict:
    """Return a line for JSON."""
    return result._asdict() | {"status": status(result)} | rates(result, devices, peak)


def gibibytes(size: float) -> str:
    """Return bytes in GiB."""
    return f"{size / 2**30:.3g} GiB"


def _power(value: float | None) -> str:
    """Return a number with one digit, such as 3e-7."""
    if value is None or not value:
        return "" if value is None else "0"
    power = math.floor(math.log10(value))
    return f"{value / 10**power:.0f}e{power}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    size, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "us")
    return f"{size:.3g} {unit}"


def _rate(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}" if value < 100 * unit else f"{value / unit:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
