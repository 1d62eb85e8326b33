"""Compiled programs, kept on disk between processes: JAX's own cache, in the user's cache folder, bounded and mended."""

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

LARGEST = 8 * 2**30  # bytes; the least recently used programs go first. The programs of a 7b are some 100 MB each
MOST = 2000  # programs: JAX looks at all of them before it writes one more
LOCK_SECONDS = 5
PATIENCE = 4  # seconds before a compilation is announced
JAX_FAILURES = ("Error writing persistent compilation cache", "Error reading persistent compilation cache")


def keep_programs(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Let JAX keep what it compiles in the user's cache folder, and use it again; return the folder.

    JAX_COMPILATION_CACHE_DIR names another folder, for which JAX's own settings count; JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing. A folder that cannot be written costs a line on stderr and no run.
    """
    if environment.get("JAX_COMPILATION_CACHE_DIR") or not jax.config.jax_enable_compilation_cache:
        return None
    folder = cache_folder(environment) / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
    except (OSError, filelock.Timeout) as error:
        _say_not_kept(f"{folder}: {getattr(error, 'strerror', None) or error}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _tell_failures_in_one_line()
    return folder


def keep_no_programs() -> None:
    """Neither read nor write compiled programs in this process."""
    jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def announced(program: str) -> Iterator[None]:
    """Say that a program is being compiled, if what happens inside takes so long that one would wonder."""
    folder = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    kept = f"the next run finds it in {folder}" if folder else "the next run compiles it again"
    line = f"compiling {program}: seconds for a small model, minutes for a large one; {kept}"
    timer = threading.Timer(PATIENCE, lambda: tqdm.write(line, file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tidy(folder: Path) -> None:
    """Remove the programs that were used longest ago, beyond `MOST`, and those that a killed process wrote in part.

    JAX writes <key>-cache and then <key>-atime, both under the lock. Without the second, it would fail at every later write.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        programs = {
            program: program.with_name(program.name.removesuffix("-cache") + "-atime") for program in folder.glob("*-cache")
        }
        whole = [program for program, used in programs.items() if used.is_file()]
        whole.sort(key=lambda program: programs[program].stat().st_mtime, reverse=True)
        for program in programs.keys() - set(whole[:MOST]):
            program.unlink()
            programs[program].unlink(missing_ok=True)


def _say_not_kept(reason: str) -> None:
    print(f"compiled programs are not kept ({reason}); the next run compiles again", file=sys.stderr, flush=True)


def _tell_failures_in_one_line() -> None:
    """Replace JAX's warnings about its cache, two lines for each program, by one line; a full disk stops no run."""
    show = warnings.showwarning

    def told(message, category, filename, lineno, file=None, line=None):
        if not str(message).startswith(JAX_FAILURES):
            return show(message, category, filename, lineno, file, line)
        if jax.config.jax_enable_compilation_cache:
            keep_no_programs()
            _say_not_kept(str(message).partition("': ")[2].splitlines()[0])

    warnings.showwarning = told
