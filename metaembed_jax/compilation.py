"""The cache of compiled programs on disk: JAX's own, in the user's cache folder, of bounded size."""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock
import jax
from tqdm import tqdm

from metaembed_jax.files import cache_folder

MAX_BYTES = 8 * 2**30  # JAX removes the least recently used programs first; a program of a 7b has about 100 MB
MAX_PROGRAMS = 2000  # JAX lists all of them for each write
LOCK_SECONDS = 5
ANNOUNCE_SECONDS = 4  # of a compilation, before a line reports it
CACHE_WARNINGS = ("Error writing persistent compilation cache", "Error reading persistent compilation cache")


def keep_programs(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Keep compiled programs in the user's cache folder from now on; return the folder, None if nothing is kept there.

    JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE=false take precedence. A folder that is not writable is
    reported on stderr, and the run continues.
    """
    if environment.get("JAX_COMPILATION_CACHE_DIR") or not _is_on():
        return None
    folder = cache_folder(environment) / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
    except (OSError, filelock.Timeout) as error:
        _report_failure(f"{folder}: {getattr(error, 'strerror', None) or error}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _shorten_cache_warnings()
    return folder


def keep_no_programs() -> None:
    """Turn the cache off for this process."""
    jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def announced(program: str) -> Iterator[None]:
    """Print a line on stderr if the block, which compiles a program, takes longer than `ANNOUNCE_SECONDS`."""
    folder = jax.config.jax_compilation_cache_dir if _is_on() else None  # pyright: ignore[reportAttributeAccessIssue]  JAX adds its flags at run time
    outlook = f"the next run reads it from {folder}" if folder else "the next run compiles it again"
    line = f"compiling {program}: seconds for a small model, minutes for a large one; {outlook}"
    timer = threading.Timer(ANNOUNCE_SECONDS, lambda: tqdm.write(line, file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_on() -> bool:
    return jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]  JAX adds its flags at run time


def _prune(folder: Path) -> None:
    """Remove the least recently used programs beyond `MAX_PROGRAMS`, and those that a killed process did not complete.

    JAX writes <key>-cache and then <key>-atime, both under the lock. Where the second is missing, every later write of JAX fails.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        programs = {
            program: program.with_name(program.name.removesuffix("-cache") + "-atime") for program in folder.glob("*-cache")
        }
        complete = [program for program, access_time in programs.items() if access_time.is_file()]
        complete.sort(key=lambda program: programs[program].stat().st_mtime, reverse=True)
        for program in programs.keys() - set(complete[:MAX_PROGRAMS]):
            program.unlink()
            programs[program].unlink(missing_ok=True)


def _report_failure(reason: str) -> None:
    print(f"compiled programs are not kept ({reason}); the next run compiles again", file=sys.stderr, flush=True)


def _shorten_cache_warnings() -> None:
    """Replace JAX's warnings about its cache, two lines for each program (on a full disk, for example), by a single line."""
    show = warnings.showwarning

    def show_once(message, category, filename, lineno, file=None, line=None):
        if not str(message).startswith(CACHE_WARNINGS):
            show(message, category, filename, lineno, file, line)
        elif _is_on():
            keep_no_programs()
            _report_failure(str(message).partition("': ")[2].splitlines()[0])

    warnings.showwarning = show_once
