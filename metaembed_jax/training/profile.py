"""Where a run's time goes: seconds by what they went to, and traces for the profiler."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from metaembed_jax import files

KINDS = ("input", "compile", "step", "validation", "checkpoint")


class Stopwatch:
    """Seconds since the last reading, by what they went to; what nothing else claims is the step's."""

    def __init__(self):
        self._began, self._spent = time.monotonic(), dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Counts what happens inside as time of this kind."""
        began = time.monotonic()
        yield
        self._spent[kind] += time.monotonic() - began

    def spent(self, kind: str) -> float:
        """Seconds of this kind since the last reading."""
        return self._spent[kind]

    def read(self) -> dict[str, float]:
        """{"seconds/input": waited for batches, "seconds/checkpoint": without what the background writes, ...} of `KINDS`."""
        now, spent = time.monotonic(), self._spent
        spent["step"] = now - self._began - sum(spent.values())
        self._began, self._spent = now, dict.fromkeys(KINDS, 0.0)
        return {f"seconds/{kind}": seconds for kind, seconds in spent.items()}


class Trace:
    """Traces some steps of a run into <workdir>/trace, which TensorBoard's profile plugin and xprof show.

    Args:
      steps: (first, last), both traced; empty for none.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path):
        self._steps, self._path, self._uploads = steps, workdir / "trace", None

    def before(self, step: int) -> None:
        """To be called before a step is dispatched."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and self._uploads is None:
            self._uploads = files.Uploads(self._path)
            jax.profiler.start_trace(str(self._uploads.folder))

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """To be called after a step is dispatched; waits for it if it is the last one to trace."""
        if self._uploads is not None and step == self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._uploads is not None:
            jax.profiler.stop_trace()
            self._uploads.close()
            self._uploads = None
