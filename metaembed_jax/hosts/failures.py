"""End all hosts when one fails or is terminated, with its message and exit code."""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

from metaembed_jax.errors import UserError
from metaembed_jax.hosts import count_hosts, is_first, key_value_store
from metaembed_jax.hosts.votes import POLL, TERMINATED, Terminated

FAILED, SEEN = "metaembed/failed", "metaembed/seen/"  # keys of the store: the first failure; the hosts that have read it
GRACE = 10  # seconds for the other hosts to read the first failure
LOST = ("closed by peer", "reset by peer", "Broken pipe", "refused", "heartbeat", "UNAVAILABLE")  # in errors of collectives
_ending = threading.Lock()  # held by the thread that ends the process


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Silence all hosts but the first inside the block. When one fails or is terminated, end all with its message and exit code."""
    if count_hosts() == 1:
        yield
        return
    finished = threading.Event()
    threading.Thread(target=_watch, args=(finished,), daemon=True).start()
    silence = contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8"))
    try:
        with silence:
            yield
        finished.set()
    except BaseException as reason:
        finished.set()
        error = _lost_host(reason) or reason
        code = TERMINATED if isinstance(error, Terminated) else 2 if isinstance(error, UserError | OSError) else 1
        _report(error, code)
        # At exit, JAX would wait for the other hosts, which do not end.
        atexit.register(_end, code)
        raise error from (None if error is reason else reason)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, together with all other hosts.

    Python's own exit ends threads that are still inside JAX, which sometimes aborts a host.
    """
    if count_hosts() == 1:
        sys.exit(code)
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _lost_host(error: BaseException) -> UserError | None:
    """Return the error to report if a collective failed because another host is gone; None for other errors."""
    if not isinstance(error, RuntimeError | ValueError) or not any(mark in str(error) for mark in LOST):
        return None
    reason = str(error).splitlines()[0]
    return UserError(f"another host has died or cannot be reached ({reason}); start the same command on all hosts again")


def _report(error: BaseException, code: int) -> None:
    """Write this host's failure to the store, and wait until the other hosts have read it.

    If another host failed first, that may be the cause, and this host ends with that failure.
    """
    store = key_value_store()
    reason = str(error) if isinstance(error, UserError | Terminated) else f"{type(error).__name__}: {error}"
    try:
        store.key_value_set(FAILED, f"{code} host {jax.process_index()}: {reason}")
    except jax.errors.JaxRuntimeError:
        _follow(store.key_value_try_get(FAILED))
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and len(store.key_value_dir_get(SEEN)) < count_hosts() - 1:
        time.sleep(0.2)


def _watch(finished: threading.Event) -> None:
    """Wait for another host's failure, and end this process: it may hang in a collective that the other host never joins."""
    while not finished.wait(POLL):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _follow(key_value_store().key_value_try_get(FAILED))


def _follow(failure: str) -> None:
    """End this process with the message and exit code of another host's failure."""
    if not _ending.acquire(blocking=False):
        time.sleep(GRACE)  # another thread ends it
    code, _, reason = failure.partition(" ")
    print(reason if int(code) == TERMINATED else f"error: {reason}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first host, which keeps the store, has ended
        key_value_store().key_value_set(f"{SEEN}{jax.process_index()}", "")
    _end(int(code))


def _end(code: int) -> NoReturn:
    """End this process at once; on the first host, which keeps the store, after two seconds."""
    sys.stdout.flush()
    if is_first():
        time.sleep(2)
    os._exit(code)
