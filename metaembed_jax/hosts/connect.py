"""Connect the hosts of a run. A host that does not come is an error of one line."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from metaembed_jax.errors import UserError
from metaembed_jax.hosts.cluster import Cluster, find_cluster

COORDINATOR_SECONDS = 50  # time limit for the first host to answer
START_SECONDS = 300  # time limit for all hosts to come, as in JAX
RETRY_SECONDS = 0.5


def connect_hosts(coordinator: str | None, hosts: int | None, host: int | None) -> None:
    """Connect to the other hosts of a run, by the flags or by the cluster of this machine; without either, this host runs alone.

    Args:
      coordinator: address:port of the first host.
      hosts: the number of hosts.
      host: the number of this host, from 0.

    Raises:
      UserError: only one or two of the three flags, malformed ones, or a host that does not answer in time.
    """
    if coordinator is None and hosts is None and host is None:
        cluster = find_cluster()
    elif coordinator is None or hosts is None or host is None:
        raise UserError("--coordinator, --hosts and --host belong together: give all three, or none on a TPU slice or under Slurm")
    else:
        cluster = Cluster("--hosts", coordinator, hosts, host)
    if cluster is None:
        return
    _check_cluster(cluster)
    if cluster.hosts > 1:
        _connect(cluster)


def _connect(cluster: Cluster) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM instead of `votes.stop_signal`
    name = f"host {cluster.host} of {cluster.hosts} ({cluster.kind})"
    if cluster.host == 0:
        _check_port(cluster.coordinator, name)
        print(f"{name}: waiting for the others at {cluster.coordinator}", file=sys.stderr, flush=True)
    else:
        _wait_for_coordinator(cluster.coordinator, name)
    try:
        with _time_limit(f"{name}: not all hosts came to {cluster.coordinator} within {START_SECONDS} s; start them all"):
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


def _check_cluster(cluster: Cluster) -> None:
    address, _, port = cluster.coordinator.rpartition(":")
    if address and port.isdecimal() and 0 < int(port) < 2**16 and 0 <= cluster.host < cluster.hosts:
        return
    source = "" if cluster.kind == "--hosts" else f" (by the variables of {cluster.kind})"
    raise UserError(
        f"--coordinator={cluster.coordinator} --hosts={cluster.hosts} --host={cluster.host}{source}: "
        "expected ADDRESS:PORT, a port of 1 to 65535, and 0 <= host < hosts"
    )


def _check_port(coordinator: str, name: str) -> None:
    """Check that the port is free; if another program has it, JAX ends in a segmentation fault."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"{name} cannot listen on port {port} ({error.strerror}); choose another port on all hosts") from error


@contextlib.contextmanager
def _time_limit(reason: str) -> Iterator[None]:
    """End this process with one line if the hosts do not come, and let Ctrl-C end it: JAX waits in C++, and then aborts."""

    def give_up() -> None:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(START_SECONDS, give_up)
    timer.daemon = True
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if handler == signal.SIG_IGN else signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)


def _wait_for_coordinator(coordinator: str, name: str) -> None:
    """Wait until the first host answers; JAX would wait for five minutes and end with a traceback."""
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
        time.sleep(RETRY_SECONDS)
