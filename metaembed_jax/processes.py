"""What processes owe each other: one writer at a time, and no worker that outlives its parent."""

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from metaembed_jax.errors import UserError


def end_with_parent() -> None:
    """Called in a worker process: it ends when its parent does, even one that was killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Holds a lock, which ends with the process at the latest. The file stays.

    Raises:
      UserError: another process holds it; says `busy`.
    """
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(busy) from None
        yield
