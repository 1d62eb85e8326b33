"""The schedule of a run's checkpoints."""

import time
from collections.abc import Callable

from metaembed_jax import hosts
from metaembed_jax.hosts.votes import Vote


class SaveSchedule:
    """Saves at multiples of a number of steps, and some minutes after the last save, by the first host's clock.

    Args:
      steps: `config.schedule.save_every`.
      minutes: `config.schedule.save_minutes`; 0: by steps only.
      now: the clock, in seconds.
    """

    def __init__(self, steps: int, minutes: float, now: Callable[[], float] = time.monotonic):
        self._steps, self._seconds, self._now, self._last = steps, 60 * minutes, now, now()
        self.vote = Vote(self._is_time)

    def due(self, step: int) -> bool:
        """Returns whether to save after this step, the same on all hosts; must be called after each step."""
        by_clock = self.vote()
        return by_clock or step % self._steps == 0

    def begin(self) -> None:
        """Restarts the minutes; must be called at each save, also at one that was not due."""
        self._last = self._now()

    def _is_time(self) -> bool:
        return hosts.is_first() and 0 < self._seconds <= self._now() - self._last
