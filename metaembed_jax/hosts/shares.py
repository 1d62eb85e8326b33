"""Arrays of items that are divided among the hosts."""

import numpy as np
from jaxtyping import Int

from metaembed_jax import hosts


def join_shares(indices: Int[np.ndarray, " n"], share: np.ndarray, count: int) -> np.ndarray:
    """Gather arrays of all `count` items on every host, from each host's share.

    Args:
      indices: the items of this host.
      share: an entry for each of them.
    """
    if hosts.count_hosts() == 1:
        return share
    padding = hosts.gather(np.array(len(indices))).max() - len(indices)
    all_indices = hosts.gather(np.pad(indices, (0, padding), constant_values=-1))
    shares = hosts.gather(np.pad(share, [(0, padding)] + [(0, 0)] * (share.ndim - 1)))
    joined = np.zeros((count, *share.shape[1:]), share.dtype)
    for indices, share in zip(all_indices, shares, strict=True):
        joined[indices[indices >= 0]] = share[indices >= 0]
    return joined
