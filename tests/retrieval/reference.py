"""The definition of a search, in float64 and with sorted lists; and random vectors."""

import numpy as np


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def exact(rng, *shape):
    """Return unit vectors whose similarities are multiples of 1 / width, exact in every type: nearly all of them tie."""
    return (rng.choice([-1, 1], shape) / np.sqrt(shape[-1])).astype(np.float32)


def cut(x, width):
    """Return the prefixes of vectors in float64, divided by their length; all numbers are taken as they are."""
    x = np.asarray(x, float)
    if width in (0, x.shape[-1]):
        return x
    return x[..., :width] / np.maximum(np.linalg.norm(x[..., :width], axis=-1, keepdims=True), 1e-12)


def search(queries, items, k, stages):
    """Return scores and rows [Q, k] of the best items, which are lists of vectors.

    Args:
      stages: (r_q, r_c, survivors) or (r_q, r_c, width, survivors), and the last without survivors.
    """
    scores, rows = np.zeros((len(queries), k)), np.zeros((len(queries), k), int)
    for q, query in enumerate(queries):
        rest = list(range(len(items)))
        for number, (r_q, r_c, *others) in enumerate(stages, 1):
            survivors = k if number == len(stages) else others.pop()
            width = others[0] if others else 0
            score = {n: (cut(query[:r_q], width) @ cut(items[n][:r_c], width).T).max(1).sum() for n in rest}
            ranked = sorted(rest, key=lambda n: (-score[n], n))
            rest = sorted(ranked[:survivors])
        rows[q] = ranked[:k]
        scores[q] = [score[n] for n in rows[q]]
    return scores, rows
