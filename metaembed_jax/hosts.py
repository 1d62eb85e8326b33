"""Several hosts that run one program on one mesh: who they are, who speaks, and how they stop together.

Every host runs the same command. What it decides on its own must come out alike everywhere; what is done once for all (files,
words) is done by the first.
"""

import atexit
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # the key-value store that its hosts share has no public name
from jax.experimental import multihost_utils

from metaembed_jax.cluster import Cluster, count_hosts, find_cluster
from metaembed_jax.errors import UserError
from metaembed_jax.votes import POLL, TERMINATED, Terminated

# Keys of the store that the hosts share.
FAILED, SEEN = "metaembed/failed", "metaembed/seen/"
COORDINATOR_SECONDS = 50  # in which the first host must answer
START_SECONDS = 300  # in which all must come, as with JAX
GRACE = 10  # seconds in which the others learn why the first one to fail fails
_said = itertools.count()
_ending = threading.Lock()  # held by the thread that ends the process


def connect(coordinator: str | None, hosts: int | None, host: int | None) -> None:
    """Join the other hosts of a run, by the flags or by the cluster of this machine; without either, this host runs alone.

    Args:
      coordinator: address:port of the first host.
      hosts: how many there are.
      host: which of them this is, from 0.

    Raises:
      UserError: one or two of the three flags, or a host that does not answer in time.
    """
    flags = (coordinator, hosts, host)
    if any(flag is not None for flag in flags) and None in flags:
        raise UserError("--coordinator, --hosts and --host belong together: give all three, or none on a TPU slice or under Slurm")
    cluster = find_cluster() if coordinator is None else Cluster("--hosts", coordinator, hosts, host)
    if cluster is None:
        return
    _check(cluster)
    if cluster.hosts == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `votes.stop_signal`
    name = f"host {cluster.host} of {cluster.hosts} ({cluster.kind})"
    if cluster.host == 0:
        _check_port(cluster.coordinator, name)
        print(f"{name}: waiting for the others at {cluster.coordinator}", file=sys.stderr, flush=True)
    else:
        _wait_for_coordinator(cluster.coordinator, name)
    try:
        with _limited(f"{name}: not all hosts came to {cluster.coordinator} within {START_SECONDS} s; start them all"):
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.hosts,
                cluster.host,
                cluster.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=START_SECONDS + 60,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{name}: the hosts did not find each other ({str(error).splitlines()[0]}); "
            "start the same command on all of them within five minutes"
        ) from error


def _check(cluster: Cluster) -> None:
    address, _, port = cluster.coordinator.rpartition(":")
    if address and port.isdecimal() and 0 < int(port) < 2**16 and 0 <= cluster.host < cluster.hosts:
        return
    source = "" if cluster.kind == "--hosts" else f" (by the variables of {cluster.kind})"
    raise UserError(
        f"--coordinator={cluster.coordinator} --hosts={cluster.hosts} --host={cluster.host}{source}: "
        "expected ADDRESS:PORT, a port of 1 to 65535, and 0 <= host < hosts"
    )


def _check_port(coordinator: str, name: str) -> None:
    """Check that the first host can listen; JAX would end in a segmentation fault where another program does."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"{name}: cannot listen on port {port} ({error.strerror}); choose another one on all hosts") from error


@contextlib.contextmanager
def _limited(reason: str) -> Iterator[None]:
    """End this process with one line where the hosts do not come, and at once by Ctrl-C: JAX waits in C++, and then aborts."""

    def leave() -> None:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(START_SECONDS, leave)
    timer.daemon = True
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if before == signal.SIG_IGN else signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def _wait_for_coordinator(coordinator: str, name: str) -> None:
    """Wait until the first host answers; JAX would wait for five minutes, and end with a traceback."""
    address, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + COORDINATOR_SECONDS
    while True:
        try:
            socket.create_connection((address.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{name}: the first host does not answer at {coordinator} ({error.strerror or error}); "
                    "start the same command there, and open that port to this host"
                ) from error
        time.sleep(POLL)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, all hosts of a run together.

    Python would first take down threads that are still inside JAX, which aborts a host now and then.
    """
    if count_hosts() == 1:
        sys.exit(code)
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the host that writes and speaks for all."""
    return jax.process_index() == 0


def first_then_others(action: Callable):
    """Runs an action on the first host, then on all others, which find what it left on shared storage."""
    if is_first():
        result = action()
    wait_for_all("first")
    if not is_first():
        result = action()
    wait_for_all("others")
    return result


def wait_for_all(name: str) -> None:
    """Returns when all hosts are here. The name says where, in errors."""
    if count_hosts() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(text: str) -> str:
    """The first host's text, on every host."""
    if count_hosts() == 1:
        return text
    client, key = distributed.global_state.client, f"metaembed/said/{next(_said)}"
    if is_first():
        client.key_value_set(key, text)
    return client.blocking_key_value_get(key, 600_000)


def gather(x: np.ndarray) -> np.ndarray:
    """Each host's array, of one shape everywhere, stacked along a new first axis: on every host."""
    return x[None] if count_hosts() == 1 else multihost_utils.process_allgather(x)


@contextlib.contextmanager
def speaking_once() -> Iterator[None]:
    """Keeps all hosts but the first silent; when one fails or is terminated, stops all with its message and exit code."""
    if count_hosts() == 1:
        yield
        return
    finished = threading.Event()
    threading.Thread(target=_watch, args=(finished,), daemon=True).start()
    words = contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8"))
    try:
        with words:
            yield
        finished.set()
    except BaseException as error:
        finished.set()
        code = error.code if isinstance(error, Terminated) else 2 if isinstance(error, UserError | OSError) else 1
        _tell_others(error, code)
        # JAX would first wait for the others, which never come to their end.
        atexit.register(_leave, code)
        raise


def _tell_others(error: BaseException, code: int) -> None:
    """Tells the other hosts why this one fails, and waits until they know.

    If another host failed first, which may be why this one fails, this one ends as that one does.
    """
    client = distributed.global_state.client
    reason = str(error) if isinstance(error, UserError | Terminated) else f"{type(error).__name__}: {error}"
    try:
        client.key_value_set(FAILED, f"{code} host {jax.process_index()}: {reason}")
    except jax.errors.JaxRuntimeError:
        _follow(client.key_value_try_get(FAILED))
    until = time.monotonic() + GRACE
    while time.monotonic() < until and len(client.key_value_dir_get(SEEN)) < count_hosts() - 1:
        time.sleep(0.2)


def _watch(finished: threading.Event) -> None:
    """Waits for another host's failure. This one may hang in a collective that the other never joins, so it ends at once."""
    client = distributed.global_state.client
    while not finished.wait(POLL):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _follow(client.key_value_try_get(FAILED))


def _follow(failure: str) -> None:
    """Ends this process as another host's failure says."""
    if not _ending.acquire(blocking=False):
        time.sleep(GRACE)  # another thread ends it
    code, _, reason = failure.partition(" ")
    print(reason if int(code) == TERMINATED else f"error: {reason}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the host that holds the store has ended
        distributed.global_state.client.key_value_set(f"{SEEN}{jax.process_index()}", "")
    _leave(int(code))


def _leave(code: int) -> None:
    """Ends this process at once; the first host a moment later, because it holds what the others talk through."""
    sys.stdout.flush()
    if is_first():
        time.sleep(2)
    os._exit(code)
