"""`python -m metaembed_jax check`: runs all cases on the devices there are, and says by its exit code whether they are right."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metaembed_jax.check import table
from metaembed_jax.check.case import SHORT, Case, Result, memory_limit, run
from metaembed_jax.check.estimate import Estimate, estimate
from metaembed_jax.check.kernels import CHIP, CPU, kernel_cases
from metaembed_jax.check.network import Subject, encode_cases, small_config, step_case
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.planning import measure
from metaembed_jax.planning.peaks import Peak, peak
from metaembed_jax.sharding import make_mesh


def check(config: ConfigDict | None, only: str = "", as_json: bool = False, devices: Sequence[jax.Device] | None = None) -> bool:
    """Print a line for each case, as soon as it is known, and what they say together.

    Args:
      config: whose network is run; None: small ones.
      only: a part of the names of the lines to run; empty for all.
      as_json: print JSON on stdout when all is done, and the table on stderr.
      devices: all by default.

    Returns:
      Whether all lines are right.

    Raises:
      UserError: a config that cannot run on these devices, or no line of such a name.
    """
    keep_cpu()
    check_devices()
    start, file = time.perf_counter(), sys.stderr if as_json else sys.stdout
    devices = jax.devices() if devices is None else devices
    subjects = make_subjects(config, devices)
    mesh, peaks = subjects[-1].mesh, peak(devices[0])
    print("\n".join([describe_devices(mesh), _about_peaks(peaks, mesh), table.HEAD]), file=file, flush=True)
    results: list[Result] = []
    with ThreadPoolExecutor(1) as beside:  # the TPU's compiler works in a process of its own
        planned = beside.submit(estimate, subjects[-1])
        for case, on in cases(subjects, mesh, only):
            results.append(run(case, on))
            print(table.line(results[-1], on.size, peaks), file=file, flush=True)
    if not results:
        raise UserError(f"--only={only}: no line has that in its name")
    for line in summary(results, planned.result(), subjects[-1], peaks, time.perf_counter() - start):
        print(line, file=file)
    if as_json:
        print(json.dumps(to_json(results, planned.result(), mesh, peaks)))
    return all(result.ok for result in results)


def keep_cpu() -> None:
    """Let JAX start its CPU backend, which references need, beside the platforms that JAX_PLATFORMS names."""
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def make_subjects(config: ConfigDict | None, devices: Sequence[jax.Device]) -> list[Subject]:
    """Return the networks to run: the config's, or small ones of each dtype; on a CPU, which has no bfloat16, of float32 alone.

    Raises:
      UserError: the config cannot be run on the devices.
    """
    if config is not None:
        measure.check(config)
        return [Subject(config, devices)]
    on_chip = devices[0].platform != "cpu"
    dtypes = SHORT if on_chip else ("float32",)
    return [Subject(small_config(len(devices), on_chip, dtype), devices) for dtype in dtypes]


def cases(subjects: list[Subject], mesh: Mesh, only: str) -> Iterator[tuple[Case, Mesh]]:
    """Yield all cases whose name holds `only`, each with the mesh it runs on."""
    apart = make_mesh(devices=list(mesh.devices.flat))  # each device has rows of its own
    for case in kernel_cases(apart, CPU if mesh.devices.flat[0].platform == "cpu" else CHIP):
        if only in case.name:
            yield case, apart
    for subject in subjects:
        for case in (*encode_cases(subject), step_case(subject)):
            if only in case.name:
                yield case, subject.mesh


def summary(results: list[Result], planned: Estimate, subject: Subject, peaks: Peak | None, seconds: float) -> Iterator[str]:
    """Yield what stands below the table: the step beside its estimate, and what is wrong."""
    yield ""
    step = results[-1]
    if step.name.startswith("train step") and step.seconds:
        yield _about_step(step, planned, subject, peaks)
    compiling = sum(result.compile_seconds or 0 for result in results)
    wrong = [result.name for result in results if not result.ok]
    verdict = f"not right: {'; '.join(wrong)}" if wrong else "all are right"
    yield f"{len(results)} lines in {seconds:.0f} s, {compiling:.0f} s of them compiling; {verdict}"


def _about_step(step: Result, planned: Estimate, subject: Subject, peaks: Peak | None) -> str:
    text = f"{step.name}: {1e3 * step.seconds:.3g} ms"
    if peaks:
        text += f", MFU {step.flops / subject.mesh.size / step.seconds / peaks.flops:.1%}"
    text += f"; estimate {1e3 * planned.seconds:.3g} ms by {planned.bound}" if planned.seconds else "; no estimate"
    text += f" ({planned.source})"
    memory = [f"{table.gibibytes(step.planned_bytes)} by the compiler" if step.planned_bytes else ""]
    memory += [f"{table.gibibytes(planned.bytes)} by plan" if planned.bytes else ""]
    memory += [f"{table.gibibytes(step.used_bytes)} used at most" if step.used_bytes else "use is not counted here"]
    return f"{text}\nmemory of a device: {', '.join(part for part in memory if part)}"


def _about_peaks(peaks: Peak | None, mesh: Mesh) -> str:
    memory = f"{table.gibibytes(memory_limit(mesh))} for programs"
    if peaks is None:
        return f"a device: {memory}; its peaks are not known\n"
    return f"a device: {peaks.flops / 1e12:.0f} TFLOP/s bf16, {peaks.hbm_bandwidth / 1e9:.0f} GB/s, {memory} ({peaks.source})\n"


def to_json(results: list[Result], planned: Estimate, mesh: Mesh, peaks: Peak | None) -> dict:
    """Return all that the table says, and more digits."""
    device = mesh.devices.flat[0]
    return {
        "ok": all(result.ok for result in results),
        "devices": describe_devices(mesh),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "peaks": peaks and peaks._asdict(),
        "memory_limit": memory_limit(mesh),
        "estimate": planned._asdict(),
        "lines": [table.to_json(result, mesh.size, peaks) for result in results],
    }
