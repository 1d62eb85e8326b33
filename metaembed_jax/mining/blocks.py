"""Search for the negatives of a block of queries.

Q queries of a block, r pairs, R vectors of a query, D width, k results of a query, K negatives of a pair.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metaembed_jax.files import replacing
from metaembed_jax.late_interaction.stages import Stages, largest_budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.mining.items import PlacedItems, SourceItems
from metaembed_jax.mining.selection import COUNTS, Selection
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval import store
from metaembed_jax.retrieval.search import Searcher

BLOCK_QUERIES = 4096  # between two writes
MOST_ANSWERS = 1024  # results of a query that are added to its ranks, for its answers; a query with more may get fewer negatives
PAIRS_AT_ONCE = 4096  # whose positives are scored together


class MinedBlock(NamedTuple):
    """The negatives of the pairs of some queries.

    Attributes:
      rows: the pairs.
      places: row and number in the pair of each negative, as for `item_of`; -1 for none.
      counts: results by `selection.COUNTS`, then pairs with fewer negatives than asked for, and those without any.
    """

    rows: Int[np.ndarray, "r"]
    places: Int[np.ndarray, "r K 2"]
    counts: Int[np.ndarray, "counts"]

    def write(self, file: Path) -> None:
        """Write the block to a file, atomically."""
        with replacing(file) as target:
            np.savez(target, **self._asdict())

    @classmethod
    def read(cls, file: Path) -> "MinedBlock":
        """Read the block of a file."""
        with np.load(file) as stored:
            return cls(*(stored[name] for name in cls._fields))


class BlockMiner:
    """Mines the pairs of a source, block by block of its queries.

    Args:
      model: encodes the queries; it has encoded the documents.
      source: training pairs, with `describe`.
      items: its queries and documents.
      index: the folder of the index of the documents, whose ids are their numbers.
      selection: chooses the negatives.
      stages: of a search.
    """

    def __init__(self, model: MetaEmbed, source: Sequence, items: SourceItems, index: Path, selection: Selection, stages: Stages):
        self._model, self._source, self._items, self._selection, self._stages = model, source, items, selection, stages
        manifest, segments = store.open_index(index)
        self._searcher = Searcher(segments, manifest.levels, manifest.width, make_mesh(), "auto")
        ids = [int(number) for segment in segments for number in segment.ids(range(len(segment)))]
        self._document_at = np.array(ids, np.int64)
        self._position_of = np.empty(len(items.documents), np.int64)
        self._position_of[self._document_at[self._searcher.is_alive]] = np.flatnonzero(self._searcher.is_alive)
        self._rows_by_query = np.argsort(items.query_of_row, kind="stable")
        self._row_starts = np.searchsorted(items.query_of_row[self._rows_by_query], np.arange(len(items.queries) + 1))

    def __len__(self) -> int:
        """Return the number of blocks."""
        return -(-len(self._items.queries) // BLOCK_QUERIES)

    def mine(self, block: int) -> MinedBlock:
        """Return the negatives of the pairs of a block of queries."""
        first = block * BLOCK_QUERIES
        numbers = range(first, min(first + BLOCK_QUERIES, len(self._items.queries)))
        answers = [self._items.answers_of(number, self._source) for number in numbers]
        query_QRD = self._model.encode_query(
            PlacedItems(self._source, self._items.queries[numbers.start : numbers.stop]), budget=largest_budget([self._stages])[0]
        )
        k = self._selection.last + min(max(map(len, answers)), MOST_ANSWERS)
        k = min([k, *(stage.survivors for stage in self._stages[:-1])])
        scores_Qk, positions_Qk = self._searcher.search(query_QRD, k, self._stages)
        documents_Qk = self._document_at[positions_Qk]
        rows = self._rows_by_query[self._row_starts[numbers.start] : self._row_starts[numbers.stop]]
        queries_r = self._items.query_of_row[rows] - first
        positives_r = self._score_positives(query_QRD, queries_r, rows)
        is_answer_Qk = np.stack(
            [np.isin(documents_k, answers_a) for documents_k, answers_a in zip(documents_Qk, answers, strict=True)]
        )
        places, counts = np.full((len(rows), self._selection.negatives, 2), -1, np.int32), Counter()
        fewer = none = 0
        for pair, (query, positive) in enumerate(zip(queries_r.tolist(), positives_r.tolist(), strict=True)):
            limit = self._selection.limit(positive, self._stages[-1].budget.query)
            chosen, pair_counts = self._selection.choose(scores_Qk[query], is_answer_Qk[query], limit)
            places[pair, : len(chosen)] = self._items.documents[documents_Qk[query, chosen]]
            counts += pair_counts
            fewer += len(chosen) < self._selection.negatives
            none += not len(chosen)
        return MinedBlock(rows, places, np.array([*(counts[name] for name in COUNTS), fewer, none], np.int64))

    def _score_positives(
        self, query_QRD: Float[np.ndarray, "Q R D"], queries_r: Int[np.ndarray, "r"], rows_r: Int[np.ndarray, "r"]
    ) -> Float[np.ndarray, "r"]:
        """Return the score of each pair's query and positive, at the last stage of a search."""
        positions_r1 = self._position_of[self._items.positive_of_row[rows_r]][:, None]
        scores = [
            self._searcher.score(
                query_QRD[queries_r[start : start + PAIRS_AT_ONCE]],
                positions_r1[start : start + PAIRS_AT_ONCE],
                self._stages[-1].budget,
            )
            for start in range(0, len(rows_r), PAIRS_AT_ONCE)
        ]
        return np.concatenate(scores)[:, 0]
