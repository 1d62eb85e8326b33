"""Several hosts that run one program on one mesh: who they are, how they agree, and how they end together.

Every host runs the same command. The first host writes files and prints for all; decisions must come out the same on every host.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the number of hosts and their key-value store have no public names
from jax.experimental import multihost_utils

BROADCAST_MILLISECONDS = 600_000
Result = TypeVar("Result")
_numbers = itertools.count()


def count_hosts() -> int:
    """Return how many hosts have joined; `jax.process_count` would start the devices first, before a config is read."""
    return distributed.global_state.num_processes or 1


def key_value_store():
    """Return JAX's client of the key-value store that several hosts share; the first host keeps the store."""
    return distributed.global_state.client


def is_first() -> bool:
    """Return whether this is the host that writes and prints for all."""
    return jax.process_index() == 0


def first_then_others(action: Callable[[], Result]) -> Result:
    """Run an action on the first host, then on all others, which find its files on shared storage."""
    result = action() if is_first() else None
    wait_for_all("first")
    if not is_first():
        result = action()
    wait_for_all("others")
    return result


def wait_for_all(name: str) -> None:
    """Return when all hosts have called this; errors show the name."""
    if count_hosts() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(text: str) -> str:
    """Return the first host's text, on every host."""
    if count_hosts() == 1:
        return text
    store, key = key_value_store(), f"metaembed/from_first/{next(_numbers)}"
    if is_first():
        store.key_value_set(key, text)
    return store.blocking_key_value_get(key, BROADCAST_MILLISECONDS)


def gather(x: np.ndarray) -> np.ndarray:
    """Stack the hosts' arrays, which have one shape, along a new first axis: on every host."""
    return x[None] if count_hosts() == 1 else multihost_utils.process_allgather(x)
