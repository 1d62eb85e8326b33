"""Several hosts that run one program on one mesh: find them, connect them, agree on decisions, and end together.

Every host runs the same command. The first host writes files and prints for all. Decisions must be the same on every host.
"""

import itertools
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the number of hosts and their key-value store have no public names
from jax.experimental import multihost_utils

BROADCAST_MILLISECONDS = 600_000
T = TypeVar("T")
_numbers = itertools.count()


def count_hosts() -> int:
    """Return the number of hosts. `jax.process_count` would also start the devices, before a config is read."""
    return distributed.global_state.num_processes or 1


def key_value_store():
    """Return JAX's client of the key-value store of several hosts, which the first host keeps."""
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("a single host has no key-value store")
    return client


def is_first() -> bool:
    """Return True on the host that writes and prints for all."""
    return jax.process_index() == 0


def first_then_others(action: Callable[[], T]) -> T:
    """Run an action on the first host, then on all others, which find its files on shared storage."""
    if is_first():
        result = action()
        wait_for_all("first")
    else:
        wait_for_all("first")
        result = action()
    wait_for_all("others")
    return result


def wait_for_all(name: str) -> None:
    """Wait until all hosts have called this; errors show the name."""
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


def gather_texts(text: str) -> list[str]:
    """Return the texts of all hosts, on every host."""
    if count_hosts() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = gather(np.array(len(encoded), np.int32))
    padded = int(lengths.max() and 2 ** int(lengths.max() - 1).bit_length())  # few shapes: each is a program
    rows = gather(np.pad(encoded, (0, padded - len(encoded)))) if padded else np.zeros((len(lengths), 0), np.uint8)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def gather_dicts(entries: dict) -> dict:
    """Merge the JSON dicts of all hosts; keys become texts."""
    texts = gather_texts(json.dumps(entries) if entries else "")  # if all are empty, only their lengths are sent
    return {key: value for text in texts if text for key, value in json.loads(text).items()}


def gather(x: np.ndarray) -> np.ndarray:
    """Stack the arrays of all hosts, which have the same shape, along a new first axis; return the result on every host."""
    return x[None] if count_hosts() == 1 else multihost_utils.process_allgather(x)
