"""Compile a program for TPUs, up to the point where its memory and its operations are known.

They are known once buffers are assigned: operations, layouts and order are final then, and the compiler dumps them. The
generation of machine code that follows takes most of the time, and changes none of them. libtpu 0.0.52 has no option to stop
before it, so the compiler runs in a separate process, which is killed there.
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

# The last file that the compiler dumps before machine code, and two earlier ones.
LAST, BUFFERS, TEXT = (f"*after_optimizations{name}.txt" for name in ("_after_buffer_assignment", "-buffer-assignment", ""))
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), page \d+, (parameter|preallocated-temp|maybe-live-out)", re.MULTILINE)


class Compiled(NamedTuple):
    """A program as compiled for one device.

    Attributes:
      text: HLO of the program.
      arguments: bytes of the inputs, with padding.
      temporaries: bytes of everything else, including results that do not reuse inputs.
      error: message of the compiler; if there is one, the other fields are empty.
    """

    text: str = ""
    arguments: int = 0
    temporaries: int = 0
    error: str = ""


def compile_program(make: Callable, config: RunConfig, topology_name: str) -> Compiled:
    """Compile a program for a slice, which this machine need not have.

    Args:
      make: `(config, mesh) -> programs.Program`; a function of a module, which another process can import.
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
    return Compiled(text, *buffer_bytes(buffers))


def buffer_bytes(buffers: str) -> tuple[int, int]:
    """Return the bytes of arguments, and those of everything else, in a dumped buffer assignment.

    The pattern does not match buffers in memories on the chip, which have a color.
    """
    sizes = dict.fromkeys(("parameter", "preallocated-temp", "maybe-live-out"), 0)
    for size, kind in _ALLOCATION.findall(buffers):
        sizes[kind] += int(size)
    return sizes["parameter"], sizes["preallocated-temp"] + sizes["maybe-live-out"]


def _wait(directory: Path, receiver: Connection) -> str:
    """Wait until the last file is complete, and return ""; if the compiler fails, return its error."""
    size = -1
    while not receiver.poll(0.5):
        last = next(directory.glob(LAST), None)
        before, size = size, last.stat().st_size if last else -1
        if last and size == before and last.read_text().endswith("}\n\n"):
            return ""
    try:
        return receiver.recv()
    except EOFError:
        return "the compiler's process died; it may have been short of memory"


def _compile(make: Callable, config: RunConfig, topology_name: str, directory: str, sender: Connection) -> None:
    jax.config.update("jax_platforms", "cpu")  # libtpu is used as a compiler only
    mesh = run_mesh(config, topology(topology_name).devices)
    options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
    with jax.set_mesh(mesh), warnings.catch_warnings():
        # JAX can write a program that is compiled without a device to its cache, but not read it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        try:
            make(config, mesh).trace().lower().compile(compiler_options=options)
            sender.send("")
        except jax.errors.JaxRuntimeError as error:
            sender.send(str(error))
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")
            raise
