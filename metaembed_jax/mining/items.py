"""The different queries and documents of a source's training pairs, by the digests of their contents.

R rows, Q queries, N documents, A pairs of a query and a document that answers it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64
from tqdm import tqdm

from metaembed_jax.data.digests import DIGEST_BYTES, content_digest
from metaembed_jax.data.document_sequence import Documents
from metaembed_jax.data.run_items import item_of
from metaembed_jax.data.sources.candidates import further_positives
from metaembed_jax.data.workers import map_with, workers_for
from metaembed_jax.files import replacing

CHUNK_ROWS = 256  # whose items are read at once, with their images


class PlacedItems(Sequence):
    """Items of a source, for the encoder, which reads their sizes from descriptions.

    Args:
      source: training pairs, with `describe`.
      places_N2: row of each item, and its number in the pair, as for `item_of`.
    """

    def __init__(self, source: Sequence, places_N2: Int[np.ndarray, "N 2"]):
        self._source, self._places = source, places_N2

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict:
        return self._item(number)

    def describe(self, number: int) -> dict:
        """Return an item with (width, height) in place of its image."""
        row, item = self._places[number].tolist()
        return item_of(self._source.describe(row), item)  # pyright: ignore[reportAttributeAccessIssue]

    def item_name(self, number: int) -> str:
        """Return the name of an item in errors."""
        row, item = self._places[number].tolist()
        return f"row {row}, {('query', 'positive')[item] if item < 2 else f'negative {item - 2}'}"

    def _item(self, number: int) -> dict:
        row, item = self._places[number].tolist()
        return item_of(self._source[row], item)


class SourceDocuments(PlacedItems, Documents):
    """The different documents of a source, to index. The id of each is its number."""

    files = ()

    def __init__(self, source: Sequence, places_N2: Int[np.ndarray, "N 2"], stamps_N: UInt64[np.ndarray, "N"]):
        super().__init__(source, places_N2)
        self._stamps = stamps_N

    def ids(self) -> list[str]:
        """Return the numbers of all documents."""
        return [str(number) for number in range(len(self))]

    def stamps(self) -> UInt64[np.ndarray, "N"]:
        """Return the first words of the digests of all documents."""
        return self._stamps

    def id_of(self, number: int) -> str:
        """Return the number of a document as a string."""
        return str(number)

    def metadata(self, number: int) -> dict:
        """Return the id of a document."""
        return {"id": str(number)}


class SourceItems(NamedTuple):
    """The different queries and documents of a source.

    Attributes:
      queries: the place of each query that is stored first: a row, and a number as for `item_of`.
      documents: the same of each document.
      stamps: of each document.
      query_of_row: the query of each row.
      positive_of_row: the positive of each row.
      answers: documents that answer query 0, then query 1, ..., ascending in each.
      starts: the first of the answers of each query, then the number of all.
    """

    queries: Int[np.ndarray, "Q 2"]
    documents: Int[np.ndarray, "N 2"]
    stamps: UInt64[np.ndarray, "N"]
    query_of_row: Int[np.ndarray, "R"]
    positive_of_row: Int[np.ndarray, "R"]
    answers: Int[np.ndarray, "A"]
    starts: Int[np.ndarray, "Q+1"]

    def answers_of(self, query: int, source: Sequence) -> Int[np.ndarray, "a"]:
        """Return the documents that answer a query: the positives of all rows with an equal query, and of `source.answering`."""
        answers = self.answers[self.starts[query] : self.starts[query + 1]]
        answering = getattr(source, "answering", None)
        if answering is None:
            return answers
        row, _ = self.queries[query].tolist()
        rows = sorted(answering(source.describe(row)["query"]))  # pyright: ignore[reportAttributeAccessIssue]
        return np.union1d(answers, self.positive_of_row[rows])


def find_items(source: Sequence, file: Path, name: str) -> SourceItems:
    """Return the different items of a source. Their digests are kept in a file, which is read if it exists.

    Args:
      name: name of the source, for the progress bar.
    """
    if not file.is_file():
        chunks = [range(first, min(first + CHUNK_ROWS, len(source))) for first in range(0, len(source), CHUNK_ROWS)]
        items_of_chunks = []
        with tqdm(total=len(source), desc=f"{name}: equal items", unit="row", mininterval=0.5, delay=1) as bar:
            for chunk, items in zip(chunks, map_with(source, _digests, chunks, workers_for(len(source))), strict=True):
                items_of_chunks.append(items)
                bar.update(len(chunk))
        digests, places, is_answer = (np.concatenate(arrays) for arrays in zip(*items_of_chunks, strict=True))
        with replacing(file) as target:
            np.savez(target, digests=digests, places=places, is_answer=is_answer)
    with np.load(file) as stored:
        return _different(stored["digests"], stored["places"], stored["is_answer"])


def _digests(source: Sequence, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the digest of each item of some rows, its place, and whether it answers the query of its row."""
    digests, places, is_answer = [], [], []
    for row in rows:
        record = source[row]
        answers = [record["positive"], *further_positives(record)]
        for number in range(2 + len(record["negatives"])):
            item = item_of(record, number)
            digests.append(content_digest(item))
            places.append((row, number))
            is_answer.append(number > 0 and any(item is answer for answer in answers))
    return np.array(digests, f"S{DIGEST_BYTES}"), np.array(places, np.int32), np.array(is_answer)


def _different(digests: np.ndarray, places: np.ndarray, is_answer: np.ndarray) -> SourceItems:
    """Return the different items of a source from the digest, the place and the kind of each item."""
    is_query = places[:, 1] == 0
    first_queries, query_of_row = _number(digests[is_query])
    first_documents, numbers = _number(digests[~is_query])
    document_places, is_answer = places[~is_query], is_answer[~is_query]
    pairs = np.stack([query_of_row[document_places[is_answer, 0]], numbers[is_answer]], axis=1)
    pairs = np.unique(pairs, axis=0)
    stamps = np.frombuffer(digests[~is_query][first_documents].tobytes(), np.uint64)[:: DIGEST_BYTES // 8].copy()
    return SourceItems(
        queries=places[is_query][first_queries],
        documents=document_places[first_documents],
        stamps=stamps,
        query_of_row=query_of_row,
        positive_of_row=numbers[document_places[:, 1] == 1],
        answers=pairs[:, 1],
        starts=np.searchsorted(pairs[:, 0], np.arange(len(first_queries) + 1)),
    )


def _number(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each different digest's first item, in order, and the number of each item's digest among them."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return first[order], numbers[inverse.reshape(-1)]
