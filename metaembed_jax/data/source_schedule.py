"""The sources of each step's sub-batches: weights kept in the long run, steps of nearly the same size.

All steps of a run have the rows that its largest step needs, so steps of different sizes leave rows empty. With typical items of
the 7b recipe, the largest of 4,000 steps has 1.04 times the mean number of tokens, and no source is more than 3 sub-batches off its
weight. If each sub-batch came from the source furthest behind its weight, it would be 1.29 times the mean.

S sources.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

_BALANCE = 10  # a step that is off its mean by one sub-batch counts as much as sources that are 10 sub-batches off their weights
_DURING = 3  # balance counts so many times less before the last sub-batch of a step, because later ones can restore it
_MOST_BEHIND = 3  # a source that is so many sub-batches behind its weight comes next, whatever its size
_WHOLE = 1 << 20  # the sum of all weights
_PERCENT = 100


def balanced_schedule(
    weights: Sequence[float], sizes_S2: Int[np.ndarray, "S 2"], sub_batches: int, steps: int
) -> Int[np.ndarray, "steps sub_batches"]:
    """Choose the source of each sub-batch. The choices of a step do not depend on how many steps follow.

    The arithmetic is in integers, so that all hosts choose the same.

    Args:
      weights: positive weights of the sources.
      sizes_S2: mean tokens and patches of a source's pairs.
      sub_batches: number of sub-batches of a step.
    """
    sum_of_weights = math.fsum(weights)
    weights_S = np.array([max(round(_WHOLE * weight / sum_of_weights), 1) for weight in weights], np.int64)
    whole = int(weights_S.sum())
    mean_2 = np.maximum((weights_S[:, None] * sizes_S2).sum(axis=0) // whole, 1)
    excess_S2 = np.minimum(_PERCENT * (np.asarray(sizes_S2, np.int64) - mean_2) // mean_2, 20 * _PERCENT)
    chosen, drawn_S = np.zeros((steps, sub_batches), np.int32), np.zeros(len(weights_S), np.int64)
    for step in range(steps):
        excess_2 = np.zeros(2, np.int64)
        for number in range(sub_batches):
            behind_S = (step * sub_batches + number + 1) * weights_S - drawn_S * whole
            unbalanced_S = ((excess_2 + excess_S2) ** 2).sum(axis=1) * (_BALANCE * whole)
            if number < sub_batches - 1:
                unbalanced_S //= _DURING
            balanced_S = 2 * _PERCENT**2 * behind_S - unbalanced_S
            source = int(np.argmax(behind_S if behind_S.max() >= _MOST_BEHIND * whole else balanced_S))
            chosen[step, number] = source
            excess_2 += excess_S2[source]
            drawn_S[source] += 1
    return chosen
