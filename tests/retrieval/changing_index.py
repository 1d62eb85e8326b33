"""An index that another process changes forever, and threads that search it and check every answer against exact search.

The writer adds batches of `BATCH` items, deletes the first `DELETED` of each in a change of its own, compacts, and builds the index
again. The number of items of a state tells which items it has.
"""

import threading
import time
from pathlib import Path

import numpy as np

import metaembed_jax as me
from metaembed_jax.errors import UserError

BATCH, DELETED, BATCHES, COMPACTED = 64, 16, 8, 3
VECTORS, WIDTH, K = 4, 16, 10
BUDGETS = ((4, 4), (2, 1), ((1, 1, 40), (4, 4)))


def unit(seed: int, items: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(items, VECTORS, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


DOCUMENTS, QUERIES = unit(0, BATCH * BATCHES), unit(1, 3)
IDS = np.array([f"item {number}" for number in range(len(DOCUMENTS))], object)


def write_forever(folder: Path, is_built) -> None:
    """Build and change the index again and again; set the event when it exists."""
    while True:
        for number in range(BATCHES):
            rows = np.arange(number * BATCH, (number + 1) * BATCH)
            metadata = [{"number": row} for row in rows.tolist()]
            if number == 0:
                index = me.Index.build(DOCUMENTS[rows], IDS[rows], metadata=metadata, dtype="float32", path=folder)
                is_built.set()
            else:
                index.add(DOCUMENTS[rows], IDS[rows], metadata=metadata)
            index.delete(IDS[rows[:DELETED]])
            if number % COMPACTED == COMPACTED - 1:
                index.compact()


def rows_of(items: int) -> np.ndarray:
    """Return the items of the state that has so many of them."""
    whole, rest = divmod(items, BATCH - DELETED)
    assert rest in (0, DELETED), f"no state has {items} items"
    is_stored = np.arange(BATCH * BATCHES).reshape(BATCHES, BATCH) % BATCH >= DELETED
    if rest:  # the last batch is not deleted from yet
        whole -= 1
        is_stored[whole] = True
    is_stored[whole + bool(rest) :] = False
    return np.flatnonzero(is_stored)


def best_of(rows: np.ndarray, budget) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and ids of the best items among rows, from float64."""
    for query_vectors, vectors, *survivors in budget if isinstance(budget[0], tuple) else [budget]:
        rows_QN = np.broadcast_to(rows, (len(QUERIES), rows.shape[-1]))
        similarity = np.einsum("qid,qnjd->qnij", QUERIES[:, :query_vectors].astype(np.float64), DOCUMENTS[rows_QN][:, :, :vectors])
        scores_QN = similarity.max(-1).sum(-1)
        order = np.argsort(-scores_QN, axis=1)[:, : survivors[0] if survivors else K]
        scores_QN, rows = np.take_along_axis(scores_QN, order, axis=1), np.take_along_axis(rows_QN, order, axis=1)
    return scores_QN, IDS[rows]


class Searches:
    """Threads that search a folder's index until a deadline. Each loads an index of its own, and searches one that all share.

    Attributes:
      count: searches that were checked.
      states: numbers of items that were seen.
      failures: what went wrong.
    """

    def __init__(self, folder: Path, **options):
        self.folder, self.options = folder, options
        self.count, self.states, self.failures = 0, set(), []
        self._expected, self._lock, self._shared = {}, threading.Lock(), None

    def run(self, threads: int, seconds: float) -> None:
        """Search in so many threads for so long."""
        deadline = time.monotonic() + seconds
        workers = [threading.Thread(target=self._run, args=(number, deadline)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _run(self, number: int, deadline: float) -> None:
        try:
            while time.monotonic() < deadline and not self.failures:
                index = self._load()
                if number == 0 or self._shared is None:
                    self._shared = index
                for budget in BUDGETS:
                    self._search(index, budget)
                    self._search(self._shared, budget)
        except BaseException as error:
            self.failures.append(error)

    def _load(self) -> me.Index:
        while True:
            try:
                return me.Index.load(self.folder, **self.options)
            except UserError as error:  # the one error that asks to try again
                if "while it was being opened" not in str(error):
                    raise

    def _search(self, index: me.Index, budget) -> None:
        hits, items = index.search(QUERIES, K, budget), len(index)
        with self._lock:
            if (items, budget) not in self._expected:
                self._expected[items, budget] = best_of(rows_of(items), budget)
            scores, ids = self._expected[items, budget]
            self.count += 1
            self.states.add(items)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_allclose(hits.scores, scores, atol=1e-5)
        assert [f"item {fields['number']}" for fields in hits.metadata(1)] == ids[1].tolist()
