"""One line of the table: a function on the devices, its reference, and what comes of running it."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from metaembed_jax.planning.measure import shard_bytes

SHORT = {"float32": "f32", "bfloat16": "bf16"}  # dtypes in names of lines
TURNS, TURN_SECONDS, MOST_CALLS = 3, 0.02, 20  # of timing: about so long each, and of no more calls, whose results take memory
# A leaf of a gradient is judged against no less than this share of the whole gradient's norm: some are 0 but for rounding, as the
# biases of keys.
SMALL_SHARE = 0.03

Outputs = Mapping[str, object]


class Case(NamedTuple):
    """What is run, and what judges it.

    Attributes:
      name: of the line.
      function: jitted (it is lowered, compiled and called), `(*arguments) -> result`.
      abstract: the arguments as shapes with shardings; None: those of `arguments`.
      arguments: `() -> tuple` of arrays on the devices.
      reference: `() -> {name: array}` in float64; where an output has a multiple of its rows, they are compared with each of its
        repetitions. A value may be a tree of arrays, which is compared by norms. None: outputs must be finite, no more.
      tolerance: the error that is allowed: the largest difference as a share of the reference's largest number.
      tolerances: of outputs with another, by their names.
      flops, bytes: of one call over all devices, at least: what the mathematics needs, and inputs and outputs moved once.
      read: result -> {name: array} to compare.
      carries: the result's first part takes the place of the first argument in the next call, which donates it.
      dtype: of the products.
      implementation: of attention, by its own account; "": the kernels that the lowered program calls.
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
    """A line of the table; figures are None where there is none.

    Attributes:
      name, dtype, flops, bytes: of the case.
      ok: the numbers are right; where nothing says what they should be, finite.
      problem: why not, in one line; "" where they are.
      error: of the output that comes closest to what is allowed of it, `tolerance`, or exceeds it the most.
      output: its name.
      implementation: who computes it: a name of `attention_implementation`, else `kernels_in` the program.
      seconds: of the fastest call.
      compile_seconds: lowering and compiling.
      planned_bytes: of a device, that the compiler reserves: arguments, results, temporaries.
      used_bytes: of a device, the most that were ever in use when the line ended; None where no one counts.
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
    """Compile, compare and time a case. Whatever it raises becomes its `problem`."""
    result = Result(case.name, case.dtype, case.flops, case.bytes)
    try:
        with jax.set_mesh(mesh):
            for result in _stages(case, result, mesh):  # noqa: B007, B020  the last that came about is returned
                pass
    except Exception as error:  # compilers and runtimes raise anything; the other lines must still run
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return result._replace(ok=False, problem=f"{type(error).__name__}: {message}")
    return result


def _stages(case: Case, result: Result, mesh: Mesh):
    """The result as far as it is known: after compiling, comparing and timing."""
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
    found = jax.device_get(case.read(output))
    if case.carries:
        arguments = (output[0], *arguments[1:])
    del output
    result = judged(case, result, found)
    yield result
    result = result._replace(seconds=best_time(compiled, arguments, case.carries), used_bytes=used_bytes(mesh))
    yield result


def judged(case: Case, result: Result, found: Outputs) -> Result:
    """Fill in whether outputs are right: finite, and as near to the reference as is allowed where there is one."""
    sick = [name for name, value in found.items() if not _is_finite(value)]
    if sick:
        return result._replace(output=sick[0], problem=f"{sick[0]}: NaN or infinities")
    if case.reference is None:
        return result._replace(ok=True)
    reference = case.reference()
    errors = {name: error_of(value, reference[name]) for name, value in found.items()}
    allowed = {name: case.tolerances.get(name, case.tolerance) for name in errors}
    name = max(errors, key=lambda name: errors[name] / allowed[name])
    ok = errors[name] <= allowed[name]
    problem = "" if ok else f"{name}: error {errors[name]:.1e}, {allowed[name]:.1e} is allowed"
    return result._replace(ok=ok, problem=problem, error=errors[name], output=name, tolerance=allowed[name])


def _is_finite(value) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(value))


def error_of(found, expected) -> float:
    """Return the error of one output."""
    return float((_tree_error if isinstance(expected, dict | tuple) else _error)(found, expected))


def _error(found, expected) -> float:
    """The largest difference as a share of the largest expected number."""
    expected = np.asarray(expected, np.float64)
    repetitions = np.asarray(found).reshape(-1, *expected.shape)
    difference = max(np.abs(each.astype(np.float64) - expected).max() for each in repetitions)
    return difference / max(np.abs(expected).max(), np.finfo(np.float32).tiny)


def _tree_error(found: dict, expected: dict) -> float:
    """The largest norm of a leaf's difference as a share of the leaf's norm, or of `SMALL_SHARE` of the whole's."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    norms = [np.linalg.norm(np.asarray(leaf, np.float64)) for _, leaf in pairs]
    floor = max(SMALL_SHARE * np.linalg.norm(norms), np.finfo(np.float32).tiny)
    differences = [np.linalg.norm(np.asarray(ours, np.float64) - theirs) for ours, theirs in pairs]
    return max(difference / max(norm, floor) for difference, norm in zip(differences, norms, strict=True))


def best_time(compiled: Callable, arguments: tuple, carries: bool) -> float:
    """Return the seconds of a call, in the fastest of some turns. Short calls are made in a row, which hides how they start."""

    def turn(calls: int) -> float:
        nonlocal arguments
        start = time.perf_counter()
        for _ in range(calls):
            output = compiled(*arguments)
            if carries:
                arguments = (output[0], *arguments[1:])
        jax.block_until_ready(output)
        return (time.perf_counter() - start) / calls

    calls = min(math.ceil(TURN_SECONDS / turn(1)), MOST_CALLS)
    return min(turn(calls) for _ in range(TURNS))


def kernels_in(text: str) -> str:
    """Return "pallas" where a lowered program calls kernels of the package's or of JAX's, "cudnn" for cuDNN's, else "xla"."""
    targets = {"tpu_custom_call": "pallas", "__cudnn": "cudnn"}
    return "+".join(kind for target, kind in targets.items() if target in text) or "xla"


def planned_bytes(compiled) -> int | None:
    """Return what the compiler reserves on a device, where it says so."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + results + memory.temp_size_in_bytes


def used_bytes(mesh: Mesh) -> int | None:
    """Return the most bytes that were ever in use on one of the devices, where the runtime counts them."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return max((each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each), default=None)


def memory_limit(mesh: Mesh) -> int:
    """Return the bytes that a program may use on each device; on a CPU, the machine's memory, shared by its devices."""
    device, *_ = mesh.local_devices
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mesh.local_devices)


def check_room(planned: int | None, mesh: Mesh) -> None:
    """Refuse a program that the devices have no room for, before its arguments are made.

    Raises:
      MemoryError: says how much it needs of how much.
    """
    limit = memory_limit(mesh)
    if planned and planned > limit:
        raise MemoryError(f"not run: it needs {planned / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f}")
