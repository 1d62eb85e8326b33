"""The k best items by their exact vectors, found with vectors of int8 and proven to be the best.

An item scores the sum over i of the max over j of <q_i, d_j>. If its int8 vectors differ from d_j by at most e, its score
differs by at most sum_i |q_i| * e, and by the rounding of float32. So a search of int8 bounds every score: an item that is not
among the K best of int8 scores at most as the last of them, plus this bound for the largest error of all items. Items whose
upper bound reaches the k best are scored again with their exact vectors, in float64 on the host. If all other items are below,
the k best are certified; if not, K grows.

The order is that of exact arithmetic: scores too close for float64 are compared as integers. Items with equal scores are in the
order of their positions.

Q queries, R vectors of a query, D width of a vector, N items, K items of a search of int8, k results.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import search_name
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.late_interaction.stages import Stage, Stages
from metaembed_jax.retrieval.exact_vectors import SQUARED_UNITS, ExactVectors
from metaembed_jax.retrieval.hits import Hits, make_hits
from metaembed_jax.retrieval.manifest import Manifest

if TYPE_CHECKING:
    from metaembed_jax.retrieval.search import Searcher

FIRST_DEPTH, DEPTH_FACTOR, LAST_DEPTH = 64, 4, 4096  # K of the first search, its growth, and K of the last search
SEARCH_RESULTS = 2**20  # of all queries by int8, in memory at once
LENGTH = 1.02  # the largest length of an exact vector: `ingest.TOLERANCE`, and the rounding to bfloat16
ROUNDING32, ROUNDING64 = 2.0**-23, 2.0**-52  # the most by which an operation rounds, even if a chip cuts digits off
UNCERTIFIED = f"more than {LAST_DEPTH:,} items may be among the best, within the error of int8"


def check_certifiable(folder: Path, manifest: Manifest, stages: Stages) -> Budget:
    """Check that an index has exact vectors, and return the budget of a search without stages.

    Raises:
      UserError: the index has no exact vectors, or the search has stages or a width.
    """
    *earlier, (budget, _) = stages
    if earlier:
        raise UserError(f"certified=True with the budget {search_name(stages)}: expected one budget (r_q, r_c), without stages")
    if budget.numbers(manifest.width) < manifest.width:
        raise UserError(f"certified=True with the budget {budget}: expected one without a width, because exact vectors are whole")
    if manifest.dtype == "int8" and not manifest.exact:
        raise UserError(
            f"certified=True: {folder} has no exact vectors; index again with dtype='int8' and exact='float32' or 'bfloat16'"
        )
    return budget


def search_certified(
    searcher: "Searcher",
    query_QRD: Float[np.ndarray, "Q R D"],
    k: int,
    budget: Budget,
    is_candidate_N: Bool[np.ndarray, " N"] | None,
) -> Hits:
    """Return the k best items of each query by their exact vectors.

    Args:
      k: at most the number of items that are searched.
      budget: vectors of a query and of an item.
      is_candidate_N: mask of the items to search; None searches all that are not deleted.

    Raises:
      UserError: a file is damaged.
    """
    exact, is_searched_N = ExactVectors(searcher.segments, searcher.levels, searcher.width), searcher.is_alive
    if is_candidate_N is not None:
        is_searched_N = is_searched_N & is_candidate_N
    items, errors_N = int(is_searched_N.sum()), exact.errors(budget.document)
    largest_error = float(errors_N[is_searched_N].max(initial=0))
    scores_Qk, positions_Qk = (np.zeros((len(query_QRD), k), dtype) for dtype in (np.float32, np.int32))
    is_certified_Q, rescored_Q = np.full(len(query_QRD), k == 0), np.zeros(len(query_QRD), np.int32)
    pending, depth, last = np.flatnonzero(~is_certified_Q), max(FIRST_DEPTH, 2 * k), min(max(LAST_DEPTH, 2 * k), items)
    while len(pending):
        depth = min(depth, last)
        at_once = max(SEARCH_RESULTS // depth, 1)
        for start in range(0, len(pending), at_once):
            numbers = pending[start : start + at_once]
            scores_QK, positions_QK = searcher.search(query_QRD[numbers], depth, (Stage(budget),), is_candidate_N)
            for number, scores_K, positions_K in zip(numbers.tolist(), scores_QK, positions_QK, strict=True):
                query = _Query(exact, query_QRD[number, : budget.query], budget.document, largest_error)
                best = query.certify(scores_K, positions_K, errors_N[positions_K], k, depth == items)
                scores_Qk[number], positions_Qk[number], is_certified_Q[number], rescored_Q[number] = best
        pending = pending[~is_certified_Q[pending]] if depth < last else pending[:0]
        depth *= DEPTH_FACTOR
    reason = "" if is_certified_Q.all() else UNCERTIFIED
    hits = make_hits(searcher.segments, scores_Qk, positions_Qk)
    return dataclasses.replace(hits, certified=is_certified_Q, uncertified_reason=reason, rescored=rescored_Q)


class _Query:
    """A query, and the bounds of its scores.

    Args:
      query_RD: the vectors that are searched with.
      vectors: vectors of an item.
      largest_error: of the items that are searched.
    """

    def __init__(self, exact: ExactVectors, query_RD: Float[np.ndarray, "R D"], vectors: int, largest_error: float):
        self._exact, self._query_RD, self._vectors = exact, query_RD, vectors
        self._largest_error = largest_error
        self._length = float(np.linalg.norm(query_RD.astype(float), axis=1).sum()) * (1 + 1e-9)
        # A product is rounded, and D products, a scale and the sum over R: the standard bound, of any order of summation.
        operations = sum(query_RD.shape) + 16
        self._rounding32 = self._length * (LENGTH + largest_error) * operations * ROUNDING32 / (1 - operations * ROUNDING32)
        self._rounding64 = self._length * LENGTH * operations * ROUNDING64 / (1 - operations * ROUNDING64)

    def certify(
        self,
        scores_K: Float[np.ndarray, " K"],
        positions_K: Int[np.ndarray, " K"],
        errors_K: Float[np.ndarray, " K"],
        k: int,
        is_all: bool,
    ) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"], bool, int]:
        """Return scores and positions of the k best items, True if they are proven to be, and the number of items scored again.

        Args:
          scores_K, positions_K, errors_K: the best items by int8, best first.
          is_all: they are all items that are searched.
        """
        upper_K = scores_K + self._length * errors_K.astype(float) + self._rounding32
        scores = self._score(positions_K[:k])
        rest = k + np.flatnonzero(~(upper_K[k:] < scores.min() - self._rounding64))
        positions = positions_K[np.concatenate([np.arange(k), rest])]
        scores = np.concatenate([scores, self._score(positions_K[rest])])
        scores, positions = self._in_order(scores, positions, k)
        upper = float(scores_K[-1]) + self._length * self._largest_error + self._rounding32
        is_certified = is_all or bool(upper < scores[-1] - self._rounding64)
        return scores.astype(np.float32), positions, is_certified, k + len(rest)

    def _score(self, positions: np.ndarray) -> np.ndarray:
        scores = self._exact.score(self._query_RD, positions, self._vectors)
        if not np.isfinite(scores).all():  # items that passed `ingest` have vectors
            folder = self._exact.segments[0].folder.parent
            raise UserError(f"{folder}: an item has no vectors; build the index again")
        return scores

    def _in_order(self, scores: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best of some items in the order of exact arithmetic."""
        order = np.lexsort((positions, -scores))
        scores, positions = scores[order], positions[order]
        ends = np.flatnonzero(np.append(scores[:-1] - scores[1:] > 2 * self._rounding64, True)) + 1
        for start, end in zip((0, *ends), ends, strict=False):
            if start >= k:
                break
            if end - start > 1:
                exact = self._exact.score_exactly(self._query_RD, positions[start:end], self._vectors)
                order = sorted(range(end - start), key=lambda n: (-exact[n], positions[start + n]))
                positions[start:end] = positions[start:end][order]
                scores[start:end] = [exact[n] / SQUARED_UNITS for n in order]  # rounded once
        return scores[:k], positions[:k]
