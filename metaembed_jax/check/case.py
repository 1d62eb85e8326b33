"""A case of the check, a function with its reference, and its result, a line of the table."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from metaembed_jax.sharding import shard_bytes

SHORT = {"float32": "f32", "bfloat16": "bf16"}  # dtypes in the names of lines
TURNS, TURN_SECONDS, MAX_CALLS = 3, 0.02, 20  # of timing; the results of all calls of a turn take memory
# The error of a gradient's leaf is relative to the leaf's norm, or to this share of the whole gradient's norm if that is larger:
# some leaves, such as the biases of keys, are 0 up to rounding.
SMALL_SHARE = 0.03

Outputs = Mapping[str, object]


class Case(NamedTuple):
    """A function with its inputs and its expected outputs.

    Attributes:
      name: name in the table.
      function: jitted, `(*arguments) -> result`.
      arguments: `() -> tuple` of arrays on the devices.
      reference: `() -> {name: array}` in float64. An output may repeat the rows of its reference. A value may be a tree of arrays,
        which is compared by norms. None: outputs must only be finite.
      tolerance: the allowed error: the largest difference, relative to the reference's largest number.
      flops: FLOPs of the model, in one call on all devices.
      bytes: bytes of inputs and outputs, moved once.
      tolerances: tolerance by name, for outputs that have another one.
      abstract: the arguments as shapes with shardings; None to take those of `arguments`.
      read: result -> {name: array} to compare.
      carries: the function donates its first argument, and the first item of its result is that of the next call.
      dtype: type of the products.
      implementation: a name of `attention_implementation`; empty for the kernels that the lowered program calls.
    """

    name: str
    function: Callable
    arguments: Callable[[], tuple]
    reference: Callable[[], Outputs] | None
    tolerance: float
    flops: float
    bytes: float
    tolerances: Mapping[str, float] = {}
    abstract: tuple | None = None
    read: Callable = lambda result: result
    carries: bool = False
    dtype: str = "float32"
    implementation: str = ""


class Result(NamedTuple):
    """A line of the table; unknown figures are None.

    Attributes:
      name, dtype, flops, bytes: as in `Case`.
      ok: the numbers are right; without a reference, they are finite.
      problem: the error in one line; empty if there is none.
      output, error, tolerance: the output whose error is largest, relative to its tolerance.
      implementation: the case's, else `kernels_in` the lowered program.
      seconds: time of the fastest call.
      compile_seconds: time of lowering and compiling.
      planned_bytes: bytes reserved by the compiler on a device, for arguments, results and temporaries.
      used_bytes: the most bytes in use on a device since the command started, if the runtime counts them.
    """

    name: str
    dtype: str
    flops: float
    bytes: float
    ok: bool = False
    problem: str = ""
    error: float | None = None
    tolerance: float | None = None
    output: str = ""
    implementation: str = ""
    seconds: float | None = None
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    used_bytes: int | None = None


def run(case: Case, mesh: Mesh) -> Result:
    """Compile, compare and time a case. An exception becomes its `problem`."""
    result = Result(case.name, case.dtype, case.flops, case.bytes)
    try:
        with jax.set_mesh(mesh):
            for result in _stages(case, result, mesh):  # noqa: B007, B020  the last one before an error is returned
                pass
    except Exception as error:  # compilers and runtimes raise anything; the other lines must still run
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return result._replace(ok=False, problem=f"{type(error).__name__}: {message}")
    return result


def _stages(case: Case, result: Result, mesh: Mesh) -> Iterator[Result]:
    """Yield the result after compiling, after comparing and after timing."""
    if case.abstract is not None:
        check_room(shard_bytes(case.abstract), mesh)
    arguments = case.arguments() if case.abstract is None else case.abstract
    start = time.perf_counter()
    lowered = case.function.lower(*arguments)
    result = result._replace(implementation=case.implementation or kernels_in(lowered.as_text()))
    compiled = lowered.compile()
    result = result._replace(compile_seconds=time.perf_counter() - start, planned_bytes=planned_bytes(compiled))
    yield result
    if case.abstract is not None:
        check_room(result.planned_bytes, mesh)
        arguments = case.arguments()
    output = compiled(*arguments)
    outputs = jax.device_get(case.read(output))
    if case.carries:
        arguments = (output[0], *arguments[1:])
    del output
    result = compared(case, result, outputs)
    yield result
    result = result._replace(seconds=best_time(compiled, arguments, case.carries), used_bytes=used_bytes(mesh))
    yield result


def compared(case: Case, result: Result, outputs: Outputs) -> Result:
    """Return the result with the errors of the outputs. They must be finite, and within their tolerances of the reference."""
    not_finite = [name for name, value in outputs.items() if not _is_finite(value)]
    if not_finite:
        return result._replace(output=not_finite[0], problem=f"{not_finite[0]}: NaN or infinities")
    if case.reference is None:
        return result._replace(ok=True)
    reference = case.reference()
    errors = {name: error_of(value, reference[name]) for name, value in outputs.items()}
    allowed = {name: case.tolerances.get(name, case.tolerance) for name in errors}
    name = max(errors, key=lambda name: errors[name] / allowed[name])
    ok = errors[name] <= allowed[name]
    problem = "" if ok else f"{name}: error {errors[name]:.1e}, {allowed[name]:.1e} is allowed"
    return result._replace(ok=ok, problem=problem, error=errors[name], output=name, tolerance=allowed[name])


def _is_finite(value) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(value))


def error_of(outputs, expected) -> float:
    """Return the error of one output."""
    return _tree_error(outputs, expected) if isinstance(expected, dict | tuple) else _error(outputs, expected)


def _error(outputs, expected) -> float:
    """Return the largest difference, relative to the largest expected number."""
    expected = np.asarray(expected, np.float64)
    repetitions = np.asarray(outputs).reshape(-1, *expected.shape)
    difference = max(np.abs(rows.astype(np.float64) - expected).max() for rows in repetitions)
    return float(difference / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _tree_error(outputs, expected) -> float:
    """Return the largest norm of a leaf's difference, relative to the leaf's norm or to `SMALL_SHARE` of the tree's."""
    pairs = list(zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True))
    norms = [np.linalg.norm(np.asarray(leaf, np.float64)) for _, leaf in pairs]
    floor = max(SMALL_SHARE * np.linalg.norm(norms), np.finfo(np.float32).tiny)
    differences = [np.linalg.norm(np.asarray(output, np.float64) - leaf) for output, leaf in pairs]
    return float(max(difference / max(norm, floor) for difference, norm in zip(differences, norms, strict=True)))


def best_time(compiled: Callable, arguments: tuple, carries: bool) -> float:
    """Return the seconds of a call in the fastest of `TURNS`. A turn makes several calls in a row, which hides their dispatch."""

    def turn(calls: int) -> float:
        nonlocal arguments
        output, start = None, time.perf_counter()
        for _ in range(calls):
            output = compiled(*arguments)
            if carries:
                arguments = (output[0], *arguments[1:])
        jax.block_until_ready(output)
        return (time.perf_counter() - start) / calls

    calls = min(math.ceil(TURN_SECONDS / turn(1)), MAX_CALLS)
    return min(turn(calls) for _ in range(TURNS))


def kernels_in(text: str) -> str:
    """Return "pallas" for a lowered program that calls Pallas kernels, else "xla"."""
    return "pallas" if "tpu_custom_call" in text or "xla.gpu.triton" in text else "xla"


def planned_bytes(compiled) -> int | None:
    """Return the bytes that the compiler reserves on a device; None if it does not report them."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + results + memory.temp_size_in_bytes


def used_bytes(mesh: Mesh) -> int | None:
    """Return the peak bytes in use on any device; None if the runtime does not count them."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return max((counts["peak_bytes_in_use"] for counts in stats if "peak_bytes_in_use" in counts), default=None)


def memory_limit(mesh: Mesh) -> int:
    """Return the bytes that a program may use on each device; on CPUs, an equal share of the machine's memory."""
    device, *_ = mesh.local_devices
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mesh.local_devices)


def check_room(planned: int | None, mesh: Mesh) -> None:
    """Check that a program fits the devices, before its arguments are made.

    Raises:
      MemoryError: it does not fit.
    """
    limit = memory_limit(mesh)
    if planned and planned > limit:
        raise MemoryError(f"not run: it needs {planned / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f}")
