"""Memory that threads share."""

import contextlib
import threading
from collections.abc import Iterator


class SharedMemory:
    """Bytes that threads may hold together. A thread that needs more than is free waits; one that needs more than all, for all.

    Args:
      limit: the bytes.
    """

    def __init__(self, limit: int):
        self._limit, self._held, self._released = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them."""
        size = min(size, self._limit)
        with self._released:
            self._released.wait_for(lambda: self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._released:
                self._held -= size
                self._released.notify_all()
