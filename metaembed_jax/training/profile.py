"""The time of a run: seconds by activity, and traces for the profiler."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from metaembed_jax import files

ACTIVITIES = ("input", "compile", "step", "validation", "checkpoint")


class Stopwatch:
    """Seconds of each activity since the last reading; "step" is the time of no other activity."""

    def __init__(self):
        self._start(time.monotonic())

    def _start(self, now: float) -> None:
        self._began = now
        self._spent: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)

    @contextlib.contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Count the time inside the block for an activity."""
        began = time.monotonic()
        yield
        self._spent[activity] += time.monotonic() - began

    def spent(self, activity: str) -> float:
        """Return the seconds of an activity since the last reading."""
        return self._spent[activity]

    def read(self) -> dict[str, float]:
        """Return "seconds/ACTIVITY" of all `ACTIVITIES`, and start again at 0.

        "seconds/input" is the time that was waited for batches. "seconds/checkpoint" does not count writing in the background.
        """
        now, spent = time.monotonic(), self._spent
        spent["step"] = now - self._began - sum(spent.values())
        self._start(now)
        return {f"seconds/{activity}": seconds for activity, seconds in spent.items()}


class Trace:
    """Traces steps of a run into <workdir>/trace, for TensorBoard's profile plugin and xprof.

    Args:
      steps: (first, last), both traced; empty for none.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path):
        self._steps, self._path, self._uploads = steps, workdir / "trace", None

    def before(self, step: int) -> None:
        """Start tracing at the first step to trace; must be called before each step is dispatched."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and self._uploads is None:
            self._uploads = files.Uploads(self._path)
            jax.profiler.start_trace(str(self._uploads.folder))

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """Wait for the last step to trace and write the trace; must be called after each step is dispatched."""
        if self._uploads is not None and step == self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """Write what is traced so far."""
        if self._uploads is not None:
            jax.profiler.stop_trace()
            self._uploads.close()
            self._uploads = None
