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
      UserError: another process holds it; says `busy`. Or there can be no such file.
    """
    try:
        lock = open(file, "a", opener=_open)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(busy) from None
        yield


def _open(path: str, flags: int) -> int:
    """Neither leaves the folder by a link, nor waits for one who reads a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
