"""The split of each row of a source.

Rows that share a query or a positive, directly or through other rows, are in the same split.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse.csgraph
from jaxtyping import Int

from metaembed_jax.data.sources.records import HELD_OUT_SPLITS

MOST_HELD_OUT_ROWS = 256
LARGEST_SHARE = 8  # a component of more than an eighth of the rows is always for training


def components_of(contents: Sequence[Sequence[bytes] | None]) -> Int[np.ndarray, "R"]:
    """Return the number of each row's component.

    Args:
      contents: digests of each row's query, positive and further positives; None for a row that shares nothing.
    """
    numbers, edges, rows = {}, [], len(contents)
    for row, digests in enumerate(contents):
        keys = [(number > 0, digest) for number, digest in enumerate(digests or ())]
        edges += [(row, rows + numbers.setdefault(key, len(numbers))) for key in keys]
    nodes = rows + len(numbers)
    first, second = np.array(edges, np.int64).reshape(-1, 2).T
    graph = scipy.sparse.coo_matrix((np.ones(len(edges), bool), (first, second)), (nodes, nodes))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:rows]


def held_out(components: Int[np.ndarray, "R"]) -> dict[int, str]:
    """Return the split of each row that is not for training: random components.

    A split has at most `MOST_HELD_OUT_ROWS` rows, and at most a twentieth of all. If no component is as small, a split takes one of
    the smallest, unless that is over `1 / LARGEST_SHARE` of the rows.
    """
    count = min(MOST_HELD_OUT_ROWS, len(components) // 20)
    if not count:
        return {}
    _, numbers, sizes = np.unique(components, return_inverse=True, return_counts=True)
    # The first random numbers do not depend on how many follow: rows that are added later leave most others where they are.
    order = np.argsort(np.random.default_rng(0).random(len(components)), kind="stable")
    _, first = np.unique(numbers[order], return_index=True)
    waiting, splits = numbers[order][np.sort(first)].tolist(), {}  # components, by their first rows in a random order
    for split in HELD_OUT_SPLITS:
        room, chosen = count, set()
        for component in waiting:
            if sizes[component] <= room:
                room -= int(sizes[component])
                chosen.add(component)
            if not room:
                break
        if not chosen and waiting:
            smallest = min(waiting, key=lambda component: sizes[component])
            chosen = {smallest} if sizes[smallest] * LARGEST_SHARE <= len(components) else set()
        splits |= dict.fromkeys(chosen, split)
        waiting = [component for component in waiting if component not in chosen]
    return {row: splits[component] for row, component in enumerate(numbers.tolist()) if component in splits}
