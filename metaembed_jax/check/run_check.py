"""The command `check`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
from jax.sharding import Mesh

from metaembed_jax.check import table
from metaembed_jax.check.case import Case, Result, memory_limit, run
from metaembed_jax.check.estimate import Estimate, estimate
from metaembed_jax.check.kernel_cases import CHIP, CPU, kernel_cases
from metaembed_jax.check.network_cases import MAX_FLOPS, CheckedNetwork, encode_case, small_config, step_case
from metaembed_jax.chips import Peak, peak
from metaembed_jax.config.run import RunConfig
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.training.stages import with_architecture


def check(config: RunConfig | None, only: str = "", as_json: bool = False, devices: Sequence | None = None) -> bool:
    """Run the cases on this machine's devices; print a line for each case, and a summary.

    Args:
      config: configuration of the network to run; None for small networks.
      only: a substring of the names of the cases to run; empty for all.
      as_json: print the table on stderr, and JSON on stdout at the end.
      devices: devices to run on; all by default.

    Returns:
      True if all cases are right.

    Raises:
      UserError: the config does not fit the devices, or no case has such a name.
    """
    keep_cpu()
    check_devices()
    start, file = time.perf_counter(), sys.stderr if as_json else sys.stdout
    devices = jax.devices() if devices is None else devices
    networks = make_networks(config, devices)
    mesh, peaks = networks[-1].mesh, peak(devices[0])
    print("\n".join([describe_devices(mesh), _peaks_line(peaks, mesh), table.HEAD]), file=file, flush=True)
    results: list[Result] = []
    with ThreadPoolExecutor(1) as pool:  # the TPU compiler runs in a separate process
        planned = pool.submit(estimate, networks[-1].config, mesh, networks[-1].flops.model)
        for case, case_mesh in cases(networks, mesh, only):
            results.append(run(case, case_mesh))
            print(table.line(results[-1], case_mesh.size, peaks), file=file, flush=True)
    if not results:
        raise UserError(f"--only={only}: no case has this in its name; omit --only to run all cases")
    for line in summary(results, planned.result(), networks[-1], peaks, time.perf_counter() - start):
        print(line, file=file)
    if as_json:
        print(json.dumps(to_json(results, planned.result(), mesh, peaks)))
    return all(result.ok for result in results)


def keep_cpu() -> None:
    """Add the CPU, which computes the references, to the platforms of JAX_PLATFORMS."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  JAX adds its flags at run time
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def make_networks(config: RunConfig | None, devices: Sequence) -> list[CheckedNetwork]:
    """Return the networks to run: the config's, or a small one for each dtype (only float32 on a CPU, which has no bfloat16).

    Raises:
      UserError: the config does not fit the devices.
    """
    on_chip = devices[0].platform != "cpu"
    if config is not None:
        network = CheckedNetwork(with_architecture(config), devices)
        if not on_chip and not network.has_reference:
            raise UserError(
                f"{config.name}: a train step takes {sum(network.flops):.0e} FLOPs, and a CPU gets at most {MAX_FLOPS:.0e}; run it "
                "on a chip, or set a smaller config.rows.batch_size and config.rows.size"
            )
        return [network]
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16") if on_chip else ("float32",)
    return [CheckedNetwork(small_config(len(devices), on_chip, dtype), devices) for dtype in dtypes]


def cases(networks: list[CheckedNetwork], mesh: Mesh, only: str) -> Iterator[tuple[Case, Mesh]]:
    """Yield each case with `only` in its name, and its mesh."""
    data_mesh = make_mesh(devices=list(mesh.devices.flat))  # each device has its own rows
    for case in kernel_cases(data_mesh, CPU if mesh.devices.flat[0].platform == "cpu" else CHIP):
        if only in case.name:
            yield case, data_mesh
    for network in networks:
        for case in (encode_case(network), step_case(network)):
            if only in case.name:
                yield case, network.mesh


def summary(results: list[Result], planned: Estimate, network: CheckedNetwork, peaks: Peak | None, seconds: float) -> Iterator[str]:
    """Yield the lines below the table: the train step next to its estimate, and the cases that are wrong."""
    yield ""
    step = results[-1]
    if step.name.startswith("train step") and step.seconds:
        yield _step_lines(step, step.seconds, planned, network, peaks)
    compiling = sum(result.compile_seconds or 0 for result in results)
    wrong = [result.name for result in results if not result.ok]
    verdict = f"not right: {'; '.join(wrong)}" if wrong else "all are right"
    yield f"{len(results)} lines in {seconds:.0f} s, {compiling:.0f} s of them compiling; {verdict}"


def _step_lines(step: Result, seconds: float, planned: Estimate, network: CheckedNetwork, peaks: Peak | None) -> str:
    text = f"{step.name}: {1e3 * seconds:.3g} ms"
    if peaks:
        text += f", MFU {step.flops / network.mesh.size / seconds / peaks.flops:.1%}"
    text += f"; estimate {1e3 * planned.seconds:.3g} ms by {planned.bound}" if planned.seconds else "; no estimate"
    text += f" ({planned.source})"
    memory = [f"{table.gibibytes(step.planned_bytes)} by the compiler" if step.planned_bytes else ""]
    memory += [f"{table.gibibytes(planned.bytes)} by plan" if planned.bytes else ""]
    memory += [f"{table.gibibytes(step.used_bytes)} used at most" if step.used_bytes else "the runtime does not count its use"]
    return f"{text}\nmemory of a device: {', '.join(text for text in memory if text)}"


def _peaks_line(peaks: Peak | None, mesh: Mesh) -> str:
    memory = f"{table.gibibytes(memory_limit(mesh))} for programs"
    if peaks is None:
        return f"a device: {memory}; its peaks are not known\n"
    return f"a device: {peaks.flops / 1e12:.0f} TFLOP/s bf16, {peaks.hbm_bandwidth / 1e9:.0f} GB/s, {memory} ({peaks.source})\n"


def to_json(results: list[Result], planned: Estimate, mesh: Mesh, peaks: Peak | None) -> dict:
    """Return the table with all digits, for JSON."""
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
