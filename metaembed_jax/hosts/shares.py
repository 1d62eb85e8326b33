"""Items that are divided among the hosts, and arrays of them."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int

from metaembed_jax import hosts

T = TypeVar("T")


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this host's share of a sequence."""
    return items[jax.process_index() :: hosts.count_hosts()]


def join_shares(indices: Int[np.ndarray, " n"], entries: np.ndarray, count: int) -> np.ndarray:
    """Gather arrays of all `count` items on every host, from the arrays of each host's share.

    Args:
      indices: the items of this host.
      entries: an entry for each of them.
    """
    if hosts.count_hosts() == 1:
        return entries
    padding = hosts.gather(np.array(len(indices))).max() - len(indices)
    all_indices = hosts.gather(np.pad(indices, (0, padding), constant_values=-1))
    all_entries = hosts.gather(np.pad(entries, [(0, padding)] + [(0, 0)] * (entries.ndim - 1)))
    joined = np.zeros((count, *entries.shape[1:]), entries.dtype)
    for indices, entries in zip(all_indices, all_entries, strict=True):
        joined[indices[indices >= 0]] = entries[indices >= 0]
    return joined
