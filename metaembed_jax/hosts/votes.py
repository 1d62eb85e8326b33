"""Decisions of all hosts at the same step: to stop after SIGTERM to any of them, or to save by the clock."""

import contextlib
import itertools
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from metaembed_jax.hosts import count_hosts, key_value_store

TERMINATED = 128 + signal.SIGTERM  # the exit code of a job that a scheduler stopped, and may start again
POLL = 0.5  # seconds between reads of the store
_numbers = itertools.count()


class Terminated(SystemExit):
    """SIGTERM while nothing was unsaved; ends the process."""

    def __init__(self):
        super().__init__(TERMINATED)

    def __str__(self) -> str:
        return "stopped by SIGTERM; start the same command again"


class Vote:
    """Requests of any host, each granted on all hosts at the same call.

    A thread of each host polls the store for a request. Then the hosts agree on a call that none has reached: the call after the
    largest number of calls of any host. The devices take no part, because the main thread may wait in a step. (JAX's preemption
    service agrees on one request only, and Orbax uses it with its own step numbers.)

    Args:
      requested: returns True if this host has a request.
    """

    def __init__(self, requested: Callable[[], bool]):
        self._requested, self._lock = requested, threading.Lock()
        self._name, self._round, self._calls, self._agreed = f"metaembed/vote/{next(_numbers)}", 0, 0, math.inf

    def __call__(self) -> bool:
        """Return True at the call that the hosts agreed on, and wait while they agree. All hosts must call this equally often."""
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
        """Poll for requests in a thread until the block ends."""
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
                self._poll()

    def _poll(self) -> None:
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
    """The decision to stop after SIGTERM to any host. It is called once a step, and is true on all hosts from the same call on.

    A second SIGTERM changes nothing: a save that has started is completed.
    """

    def __init__(self):
        self._signalled, self._at_once, self._stopping = threading.Event(), False, False
        self.vote = Vote(self._signalled.is_set)

    def __call__(self) -> bool:
        """Return True to stop; once True, always True."""
        self._stopping = self._stopping or self.vote()
        return self._stopping

    def on_signal(self, *_) -> None:
        """Record SIGTERM to this host; inside `at_once`, end the process."""
        self._signalled.set()
        self._check()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop at once inside the block, without a vote: nothing is unsaved there.

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
            self._at_once = False  # a second signal must not interrupt the cleanup after the first
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
