"""The end of several hosts: one that fails or is terminated ends all, with its message and exit code."""

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

FAILED, SEEN = "metaembed/failed", "metaembed/seen/"  # keys of the store: the first failure; the hosts that know of it
GRACE = 10  # seconds in which the others learn why the first one to fail fails
_ending = threading.Lock()  # held by the thread that ends the process


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Silence all hosts but the first inside the block; when one fails or is terminated, end all with its message and exit code."""
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
    except BaseException as error:
        finished.set()
        code = error.code if isinstance(error, Terminated) else 2 if isinstance(error, UserError | OSError) else 1
        _report(error, code)
        # JAX would first wait for the others, which never come to their end.
        atexit.register(_end, code)
        raise


def leave(code: int) -> NoReturn:
    """End this process with an exit code, all hosts of a run together.

    Python would first take down threads that are still inside JAX, which aborts a host now and then.
    """
    if count_hosts() == 1:
        sys.exit(code)
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _report(error: BaseException, code: int) -> None:
    """Tell the other hosts why this one fails, and wait until they know.

    If another host failed first, which may be why this one fails, this one ends as that one does.
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
    """Wait for another host's failure. This one may hang in a collective that the other never joins, so it ends at once."""
    while not finished.wait(POLL):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _follow(key_value_store().key_value_try_get(FAILED))


def _follow(failure: str) -> None:
    """End this process as another host's failure says."""
    if not _ending.acquire(blocking=False):
        time.sleep(GRACE)  # another thread ends it
    code, _, reason = failure.partition(" ")
    print(reason if int(code) == TERMINATED else f"error: {reason}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the host that keeps the store has ended
        key_value_store().key_value_set(f"{SEEN}{jax.process_index()}", "")
    _end(int(code))


def _end(code: int) -> NoReturn:
    """End this process at once; the first host a moment later, because it keeps the store of all."""
    sys.stdout.flush()
    if is_first():
        time.sleep(2)
    os._exit(code)
