"""When a run saves."""

import time
from collections.abc import Callable

from metaembed_jax import hosts
from metaembed_jax.votes import Vote


class Saves:
    """At multiples of so many steps, and when so many minutes have gone by since the last save by the first host's clock.

    Args:
      steps: `config.save_every`.
      minutes: `config.save_minutes`; 0: the clock has no say.
      now: the clock, in seconds.
    """

    def __init__(self, steps: int, minutes: float, now: Callable[[], float] = time.monotonic):
        self._steps, self._seconds, self._now, self._last = steps, 60 * minutes, now, now()
        self.vote = Vote(self._is_time)

    def due(self, step: int) -> bool:
        """Whether to save after this step; asked after each one, and alike on all hosts."""
        by_clock = self.vote()
        return by_clock or step % self._steps == 0

    def begin(self) -> None:
        """Notes that a save begins, for whatever reason."""
        self._last = self._now()

    def _is_time(self) -> bool:
        return hosts.is_first() and 0 < self._seconds <= self._now() - self._last
