"""The schedule of a run's checkpoints."""

import time
from collections.abc import Callable

from metaembed_jax import hosts
from metaembed_jax.hosts.votes import Vote


class SaveSchedule:
    """Decides which steps are saved: multiples of a number, and the first one some minutes after the last save.

    Args:
      steps: `config.schedule.save_every`.
      minutes: `config.schedule.save_minutes`, by the first host's clock; 0: by steps only.
      now: the clock, in seconds.
    """

    def __init__(self, steps: int, minutes: float, now: Callable[[], float] = time.monotonic):
        self._steps, self._seconds, self._now, self._last = steps, 60 * minutes, now, now()
        self.vote = Vote(self._is_time)

    def due(self, step: int) -> bool:
        """Return whether to save after this step, the same on all hosts; must be called after each step."""
        by_clock = self.vote()
        return by_clock or step % self._steps == 0

    def begin(self) -> None:
        """Restart the minutes; must be called at each save, due or not."""
        self._last = self._now()

    def _is_time(self) -> bool:
        return hosts.is_first() and 0 < self._seconds <= self._now() - self._last
