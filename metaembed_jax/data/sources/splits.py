"""The split of each row of a source: rows that share a query or a positive, directly or through other rows, lie in one."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse.csgraph
from jaxtyping import Int

HELD_OUT = 256
LARGEST_SHARE = 8  # a group of more than an eighth of the rows is always for training


def groups_of(contents: Sequence[tuple[bytes, bytes] | None]) -> Int[np.ndarray, "R"]:
    """Return the number of each row's group.

    Args:
      contents: digests of each row's query and positive; None for a row that shares nothing.
    """
    numbers, edges, rows = {}, [], len(contents)
    for row, digests in enumerate(contents):
        edges += [(row, rows + numbers.setdefault(key, len(numbers))) for key in enumerate(digests or ())]
    nodes = rows + len(numbers)
    first, second = np.array(edges, np.int64).reshape(-1, 2).T
    graph = scipy.sparse.coo_matrix((np.ones(len(edges), bool), (first, second)), (nodes, nodes))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:rows]


def held_out(groups: Int[np.ndarray, "R"]) -> dict[int, str]:
    """Return the split of each row that is not for training: random groups, of at most `HELD_OUT` rows and a twentieth a split.

    If no group is as small, a split takes one of the smallest, unless that is over `1 / LARGEST_SHARE` of the rows.
    """
    count = min(HELD_OUT, len(groups) // 20)
    if not count:
        return {}
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    # The first random numbers do not depend on how many follow: rows that are added later leave most others where they are.
    order = np.argsort(np.random.default_rng(0).random(len(groups)), kind="stable")
    _, first = np.unique(numbers[order], return_index=True)
    waiting, splits = numbers[order][np.sort(first)].tolist(), {}  # groups, by their first rows in a random order
    for split in ("validation", "test"):
        room, chosen = count, set()
        for group in waiting:
            if sizes[group] <= room:
                room -= int(sizes[group])
                chosen.add(group)
            if not room:
                break
        if not chosen and waiting:
            smallest = min(waiting, key=lambda group: sizes[group])
            chosen = {smallest} if sizes[smallest] * LARGEST_SHARE <= len(groups) else set()
        splits |= dict.fromkeys(chosen, split)
        waiting = [group for group in waiting if group not in chosen]
    return {row: splits[group] for row, group in enumerate(numbers.tolist()) if group in splits}
