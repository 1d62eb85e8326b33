"""A program through the TPU's compiler, as far as its memory and its work are known.

They are known once every buffer has its place: by then operations, layouts and order are settled, and the compiler writes them
down. What it does afterwards is machine code, which takes most of its time and moves nothing any more. So it works in a process of
its own, and is stopped there. It cannot be asked to stop by itself: libtpu 0.0.52 has no such option.
"""

import multiprocessing
import re
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import jax

from metaembed_jax.config.run import RunConfig
from metaembed_jax.planning.topology import topology
from metaembed_jax.training.step import run_mesh

# What the compiler writes last before it makes machine code, and what it says before that.
LAST, BUFFERS, TEXT = (f"*after_optimizations{name}.txt" for name in ("_after_buffer_assignment", "-buffer-assignment", ""))
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), page \d+, (parameter|preallocated-temp|maybe-live-out)", re.MULTILINE)


class Compiled(NamedTuple):
    """What the compiler says of one device.

    Attributes:
      text: of the program.
      arguments: bytes of the inputs, as they lie.
      temporaries: bytes of all else, results included that do not lie in inputs.
      error: why there is nothing of all that.
    """

    text: str = ""
    arguments: int = 0
    temporaries: int = 0
    error: str = ""


def compile_program(make: Callable, config: RunConfig, topology_name: str) -> Compiled:
    """Compile a program for a slice that need not be there.

    Args:
      make: (config, mesh) -> `programs.Program`; a function of a module, which another process can import.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs XLA hangs
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        process = context.Process(target=_compile, args=(make, config, topology_name, directory, sender), daemon=True)
        process.start()
        sender.close()
        try:
            error = _wait(Path(directory), receiver)
            if error:
                return Compiled(error=error)
            text, buffers = (next(Path(directory).glob(name)).read_text() for name in (TEXT, BUFFERS))
        finally:
            process.kill()
            process.join()
    return Compiled(text, *memory(buffers))


def memory(buffers: str) -> tuple[int, int]:
    """(bytes of arguments, bytes of all else) of a buffer assignment. Buffers in other memories have a colour, and no match."""
    sizes = dict.fromkeys(("parameter", "preallocated-temp", "maybe-live-out"), 0)
    for size, kind in _ALLOCATION.findall(buffers):
        sizes[kind] += int(size)
    return sizes["parameter"], sizes["preallocated-temp"] + sizes["maybe-live-out"]


def _wait(directory: Path, receiver: Connection) -> str:
    """Returns the compiler's complaint, or nothing once it has written all that is wanted."""
    size = -1
    while not receiver.poll(0.5):
        found = next(directory.glob(LAST), None)
        before, size = size, found.stat().st_size if found else -1
        if found and size == before and found.read_text().endswith("}\n\n"):
            return ""
    try:
        return receiver.recv()
    except EOFError:
        return "the compiler's process died; it may have been short of memory"


def _compile(make: Callable, config: RunConfig, topology_name: str, directory: str, sender: Connection) -> None:
    jax.config.update("jax_platforms", "cpu")  # of the TPU only its compiler is wanted
    mesh = run_mesh(config, topology(topology_name).devices)
    options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
    with jax.set_mesh(mesh), warnings.catch_warnings():
        # What was compiled without a device can be written to JAX's cache, but not read from it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        try:
            make(config, mesh).trace().lower().compile(compiler_options=options)
            sender.send("")
        except jax.errors.JaxRuntimeError as error:
            sender.send(str(error))
