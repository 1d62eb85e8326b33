"""Threads that find sizes of items and make their arrays, ahead of the devices.

Pillow decodes and resizes, and the tokenizer works, without Python's lock: threads do what processes would (benchmarks/encode.py),
start at once, and work from any script.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.batch.items import Example, Fitted
from metaembed_jax.batch.rows import RowItem
from metaembed_jax.errors import UserError

MOST_THREADS = 8


class Reader:
    """Reads the items of a sequence.

    A sequence with `described(number)`, which is the item with (width, height) in place of its image, is read by several threads
    at once, and its images when their turn comes. Of others, an item is read once, and kept until it is made into arrays.
    A sequence with `item_name(number)` names its items in errors.

    Args:
      processor: the family's.
      items: texts, PIL images or dicts of both.
      side: "query" or "document".
      meta, budget: Meta Tokens of each item, and how many of them are read.
    """

    def __init__(self, processor: object, items: Sequence, side: str, meta: int, budget: int):
        self._processor, self._items, self._side, self._meta, self._budget = processor, items, side, meta, budget
        self._make = {"query": processor.query, "document": processor.document}[side]
        self._described, self._name = getattr(items, "described", None), getattr(items, "item_name", _name)
        self._alone = contextlib.nullcontext() if self._described else threading.Lock()
        self._held: dict[int, dict | Example] = {}
        count = min(os.cpu_count() or 1, MOST_THREADS)
        # Sizes have threads of their own: behind the items of several calls, they would keep the next calls waiting.
        self._threads, self._size_threads = ThreadPoolExecutor(count, "encode"), ThreadPoolExecutor(count, "encode sizes")

    def close(self) -> None:
        """End the threads; what waits is not done."""
        for threads in (self._size_threads, self._threads):
            threads.shutdown(wait=True, cancel_futures=True)

    def sizes(self, numbers: Sequence[int]) -> list[Future]:
        """Start to find the sizes of items: `Fitted` of each."""
        return [self._size_threads.submit(self._size, int(number)) for number in numbers]

    def row_items(self, numbers: Sequence[int]) -> list[Future]:
        """Start to make items for their rows: `RowItem` of each."""
        return [self._threads.submit(self._row_item, int(number)) for number in numbers]

    def _size(self, number: int) -> Fitted:
        if self._described:
            return self._processor.size(as_item(self._described(number), self._name(number)), self._side, name=self._name(number))
        item = self._read(number)
        if item.get("image") is not None:
            self._held[number] = item
            return self._processor.size(item, self._side, name=self._name(number))
        example = self._held[number] = self._make(item, name=self._name(number))
        return Fitted(len(example.tokens), 0, example.cut)

    def _row_item(self, number: int) -> RowItem:
        held = self._held.pop(number, None)
        if not isinstance(held, Example):
            held = self._make(self._read(number) if held is None else held, name=self._name(number))
        return RowItem(held, self._meta, self._budget)

    def _read(self, number: int) -> dict:
        with self._alone:
            return as_item(self._items[number], self._name(number))


def results(futures: Sequence[Future]) -> list:
    """The results of futures in their order; the first error is raised."""
    return [future.result() for future in futures]


def as_table(sizes: Sequence[Fitted], rows: int) -> Int[np.ndarray, "N 4"]:
    """Sizes as integers, with rows of zeros behind."""
    table = np.zeros((rows, len(Fitted._fields)), np.int32)
    table[: len(sizes)] = np.array(sizes, np.int32).reshape(-1, table.shape[1])
    return table


def as_item(item: str | Image.Image | dict, name: str = "item") -> dict:
    """A text, a PIL image or a dict, as a dict.

    Args:
      name: of the item, for errors.

    Raises:
      UserError: it is something else.
    """
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Image.Image):
        return {"image": item}
    if isinstance(item, dict):
        return item
    raise UserError(f"{name}: expected a text, a PIL image or a dict of both, not {type(item).__name__}")


def _name(number: int) -> str:
    return f"item {number}"
