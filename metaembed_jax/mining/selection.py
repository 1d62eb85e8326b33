"""The documents that become negatives of a pair: by rank, by equality and by margin.

k results of a query, best first.
"""

import dataclasses
from collections import Counter

import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.errors import UserError

WINDOW = 10  # documents that are considered for each negative, as in sentence-transformers
COUNTS = ("answers", "skipped", "close", "spare", "mined")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Rules that choose the negatives of a pair. Ranks count without the documents that answer the query.

    Defaults are those that NV-Retriever (arXiv 2407.15831) found best, TopK-PercPos at 95 %, with its 4 negatives; the window is
    that of sentence-transformers' `mine_hard_negatives`, whose names the fields have.

    Attributes:
      negatives: most negatives of a pair; the first that pass are taken.
      range_min: documents to skip at the top.
      range_max: the last rank that is considered; None: range_min + 10 * negatives.
      margin: the least difference of a negative's score from the positive's, as a mean cosine over the query's vectors.
      relative_margin: the same as a share of the positive's score, by magnitude; the larger of both counts.
    """

    negatives: int = 4
    range_min: int = 0
    range_max: int | None = None
    margin: float = 0.0
    relative_margin: float = 0.05

    def __post_init__(self):
        if self.negatives < 1:
            raise UserError(f"--negatives={self.negatives}: expected at least 1")
        if self.last - self.range_min < self.negatives:
            raise UserError(
                f"--range-max={self.last}: expected at least {self.range_min + self.negatives}, for --negatives={self.negatives} "
                f"after --range-min={self.range_min}"
            )
        for flag, value in (("margin", self.margin), ("relative-margin", self.relative_margin)):
            if not 0 <= value < np.inf:
                raise UserError(f"--{flag}={value}: expected a number of 0 or more")

    @property
    def last(self) -> int:
        """The last rank that is considered."""
        return self.range_min + WINDOW * self.negatives if self.range_max is None else self.range_max

    def limit(self, positive: float, query_vectors: int) -> float:
        """Return the highest score of a negative.

        Args:
          positive: score of the pair's positive, a sum over the query's vectors.
        """
        return positive - max(self.margin * query_vectors, self.relative_margin * abs(positive))

    def choose(
        self, scores_k: Float[np.ndarray, "k"], is_answer_k: Bool[np.ndarray, "k"], limit: float
    ) -> tuple[Int[np.ndarray, "negatives"], Counter]:
        """Return the indices of the results that become negatives of a pair, and the numbers of results by `COUNTS`.

        Args:
          limit: highest score of a negative.
        """
        others = np.flatnonzero(~is_answer_k)
        window = others[self.range_min : self.last]
        passing = window[scores_k[window] <= limit]
        chosen = passing[: self.negatives]
        # A result below the last negative, or beyond the window, is spare.
        seen = window[window <= chosen[-1]] if len(chosen) == self.negatives else window
        close = len(seen) - len(chosen)
        skipped = min(self.range_min, len(others))
        counts = len(is_answer_k) - len(others), skipped, close, len(others) - skipped - len(seen), len(chosen)
        return chosen, Counter(dict(zip(COUNTS, counts, strict=True)))
