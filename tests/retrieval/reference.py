"""The definition of a search, in float64 and with sorted lists; and random vectors."""

import numpy as np


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def exact(rng, *shape):
    """Return unit vectors whose similarities are multiples of 1 / width, exact in every type: nearly all of them tie."""
    return (rng.choice([-1, 1], shape) / np.sqrt(shape[-1])).astype(np.float32)


def search(queries, items, k, stages):
    """Return scores and rows [Q, k] of the best items, which are lists of vectors."""
    scores, rows = np.zeros((len(queries), k)), np.zeros((len(queries), k), int)
    for q, query in enumerate(queries):
        rest = list(range(len(items)))
        for r_q, r_c, *survivors in stages:
            score = {n: (query[:r_q].astype(float) @ np.asarray(items[n][:r_c], float).T).max(1).sum() for n in rest}
            ranked = sorted(rest, key=lambda n: (-score[n], n))
            rest = sorted(ranked[: survivors[0] if survivors else k])
        rows[q] = ranked[:k]
        scores[q] = [score[n] for n in rows[q]]
    return scores, rows
