"""What all hosts of a run do at the same step: stop, because SIGTERM came to any of them, or save, by the first one's clock."""

import contextlib
import itertools
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # the key-value store that its hosts share has no public name

from metaembed_jax.cluster import count_hosts

TERMINATED = 128 + signal.SIGTERM  # the exit code that schedulers read as: stopped from outside, start it again
POLL = 0.5  # seconds between looks at the store
_numbers = itertools.count()


class Terminated(SystemExit):
    """SIGTERM came while nothing was unsaved."""

    def __init__(self):
        super().__init__(TERMINATED)

    def __str__(self) -> str:
        return "stopped by SIGTERM; start the same command again"


class Vote:
    """True at one call, the same on all hosts, after the wish of any of them; then false until the next wish.

    They agree in the background on a call that none has reached yet, one more than the most that any has made when the wish is
    known to all. No device is asked: the main thread may hang in a step meanwhile. (JAX's own agreement on preemption would do for
    one wish, were Orbax not to take part in it with step numbers of its own.)
    """

    def __init__(self, wished: Callable[[], bool]):
        self._wished, self._lock = wished, threading.Lock()
        self._name, self._round, self._calls, self._agreed = f"metaembed/vote/{next(_numbers)}", 0, 0, math.inf

    def __call__(self) -> bool:
        """Whether this call is the one; waits while the hosts agree. All hosts call it equally often."""
        if count_hosts() == 1:
            return self._wished()
        with self._lock:
            self._calls += 1
            if self._calls < self._agreed:
                return False
            self._agreed = math.inf
            return True

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the hosts can agree."""
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
        client, wish = distributed.global_state.client, f"{self._name}/{self._round}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host's wish is there
            if self._wished():
                client.key_value_set(wish, "")
        try:
            client.key_value_try_get(wish)
        except jax.errors.JaxRuntimeError:  # nobody's is
            return
        with self._lock:
            client.key_value_set(f"{wish}/{jax.process_index()}", str(self._calls))
            calls = [int(client.blocking_key_value_get(f"{wish}/{host}", 60_000)) for host in range(count_hosts())]
            self._agreed, self._round = max(calls) + 1, self._round + 1


class Stop:
    """Whether to stop, because SIGTERM came to any of the hosts: asked once a step, and true on all at the same call.

    A second SIGTERM changes nothing: what is being saved is saved.
    """

    def __init__(self):
        self._came, self._leaves, self._stops = threading.Event(), False, False
        self.vote = Vote(self._came.is_set)

    def __call__(self) -> bool:
        """Whether to stop; once true, it stays so."""
        self._stops = self._stops or self.vote()
        return self._stops

    def signalled(self, *_) -> None:
        """Notes that SIGTERM came to this host, or leaves."""
        self._came.set()
        self._leave()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While nothing is unsaved, so that nobody needs to be asked.

        Raises:
          Terminated: SIGTERM came to this host, before or now.
        """
        self._leaves = True
        try:
            self._leave()
            yield
        finally:
            self._leaves = False

    def _leave(self) -> None:
        if self._leaves and self._came.is_set():
            self._leaves = False  # a second signal does not disturb what is put in order on the way out
            raise Terminated


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Whether to stop, from now on by SIGTERM; in the main thread."""
    stop = Stop()
    before = signal.signal(signal.SIGTERM, stop.signalled)
    try:
        with stop.vote.watched():
            yield stop
    except Terminated as stopped:
        print(stopped, file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
