"""Decisions of all hosts at the same step: to stop, after SIGTERM to any of them, or to save, by the clock."""

import contextlib
import itertools
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from metaembed_jax.hosts import count_hosts, key_value_store

TERMINATED = 128 + signal.SIGTERM  # the exit code by which schedulers know a job that they stopped, to start it again
POLL = 0.5  # seconds between looks at the store
_numbers = itertools.count()


class Terminated(SystemExit):
    """The end of a process that SIGTERM reached while nothing was unsaved."""

    def __init__(self):
        super().__init__(TERMINATED)

    def __str__(self) -> str:
        return "stopped by SIGTERM; start the same command again"


class Vote:
    """A request of any host, granted on all hosts at the same call; then the next request.

    A thread of each host looks for a request. Once all know of one, they agree on a call that none has reached: the next one
    after the largest number of calls that any host has made. The devices take no part, since the main thread may hang in a step
    meanwhile. (JAX's own agreement on preemption is for a single request, and Orbax takes part in it with step numbers of its
    own.)

    Args:
      requested: whether this host requests it now.
    """

    def __init__(self, requested: Callable[[], bool]):
        self._requested, self._lock = requested, threading.Lock()
        self._name, self._round, self._calls, self._agreed = f"metaembed/vote/{next(_numbers)}", 0, 0, math.inf

    def __call__(self) -> bool:
        """Return True at the call that the hosts agreed on. Waits while they agree; all hosts must call it equally often."""
        if count_hosts() == 1:
            return self._requested()
        with self._lock:
            self._calls += 1
            if self._calls < self._agreed:
                return False
            self._agreed = math.inf
            return True

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look for requests, in a thread, until the block ends."""
        if count_hosts() == 1:
            yield
            return
        finished = threading.Event()
        threading.Thread(target=self._watch, args=(finished,), daemon=True).start()
        try:
            yield
        finally:
            finished.set()

    def _watch(self, finished: threading.Event) -> None:
        while not finished.wait(POLL):
            if self._agreed == math.inf:
                self._look()

    def _look(self) -> None:
        store, request = key_value_store(), f"{self._name}/{self._round}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host's request is in the store already
            if self._requested():
                store.key_value_set(request, "")
        try:
            store.key_value_try_get(request)
        except jax.errors.JaxRuntimeError:  # no host has a request
            return
        with self._lock:
            store.key_value_set(f"{request}/{jax.process_index()}", str(self._calls))
            calls = [int(store.blocking_key_value_get(f"{request}/{host}", 60_000)) for host in range(count_hosts())]
            self._agreed, self._round = max(calls) + 1, self._round + 1


class Stop:
    """The decision to stop, after SIGTERM to any host: asked once a step, and true on all hosts from the same call on.

    A second SIGTERM changes nothing: a save that has begun is completed.
    """

    def __init__(self):
        self._signalled, self._at_once, self._stopping = threading.Event(), False, False
        self.vote = Vote(self._signalled.is_set)

    def __call__(self) -> bool:
        """Return whether to stop; once true, always true."""
        self._stopping = self._stopping or self.vote()
        return self._stopping

    def on_signal(self, *_) -> None:
        """Record SIGTERM to this host; inside `at_once`, end the process."""
        self._signalled.set()
        self._check()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop at once, without a vote, inside the block: nothing there is unsaved.

        Raises:
          Terminated: SIGTERM to this host, before or inside the block.
        """
        self._at_once = True
        try:
            self._check()
            yield
        finally:
            self._at_once = False

    def _check(self) -> None:
        if self._at_once and self._signalled.is_set():
            self._at_once = False  # a second signal must not interrupt the cleaning up after the first
            raise Terminated


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Handle SIGTERM by a `Stop` inside the block; in the main thread only."""
    stop = Stop()
    handler = signal.signal(signal.SIGTERM, stop.on_signal)
    try:
        with stop.vote.watched():
            yield stop
    except Terminated as stopped:
        print(stopped, file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
