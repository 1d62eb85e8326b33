"""Threads that read the sizes of items and make their arrays, ahead of the devices.

Pillow and the tokenizer release Python's lock, so threads are as fast as processes (benchmarks/encode.py). Threads also start at
once, and work from any script.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.batch.items import Example, Fitted, Layout
from metaembed_jax.batch.rows import RowItem
from metaembed_jax.encoding.memory import SharedMemory
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import decoded_bytes, image_size, memory_limit
from metaembed_jax.inputs.processors import ImageSize, PromptProcessor

MOST_THREADS = 8
FAILED = Fitted(-1, 0)  # of an item whose size cannot be read


class Reader:
    """Reads the items of a sequence.

    A sequence may have `describe(number)`, which returns the item with (width, height) in place of its image. Then several threads
    read the sequence, and an image is opened only for its arrays. Without it, an item is read once and kept until then.
    A sequence may have `item_name(number)`, which returns the name of an item in errors.
    A sequence may have `drawn_at(pixels)`, which returns it with pages of PDF files drawn at `processor.page_pixels`.

    The images that threads decode at the same time have together at most the memory of the largest that may be read.

    Args:
      processor: processor of the family.
      items: texts, PIL images or dicts of both.
      side: "query" or "document".
      meta, budget: number of Meta Tokens of each item, and how many of them are read; None: all states are read.
    """

    def __init__(self, processor: PromptProcessor, items: Sequence, side: str, meta: int, budget: int | None):
        if draw := getattr(items, "drawn_at", None):
            items = draw(processor.page_pixels)
        self._processor, self._items, self._side, self._meta, self._budget = processor, items, side, meta, budget
        self._make = {"query": processor.query, "document": processor.document}[side]
        self._describe, self._name = getattr(items, "describe", None), getattr(items, "item_name", _name)
        self._lock = contextlib.nullcontext() if self._describe else threading.Lock()
        self._held: dict[int, dict | Example] = {}
        self._image_sizes: dict[int, ImageSize] = {}
        self._memory = SharedMemory(memory_limit())
        count = min(os.cpu_count() or 1, MOST_THREADS)
        # Sizes have separate threads: queued after the items of several calls, they would delay the next calls.
        self._threads, self._size_threads = ThreadPoolExecutor(count, "encode"), ThreadPoolExecutor(count, "encode sizes")

    def close(self) -> None:
        """End the threads, and cancel reads that have not started."""
        for threads in (self._size_threads, self._threads):
            threads.shutdown(wait=True, cancel_futures=True)

    def sizes(self, numbers: Sequence[int]) -> list[Future]:
        """Start to read the sizes of items, and return a future `Fitted` for each."""
        return [self._size_threads.submit(self._size, int(number)) for number in numbers]

    def row_item(self, number: int, prompt: tuple[int, int]) -> Future:
        """Start to make the arrays of an item, and return a future `RowItem`.

        Args:
          prompt: tokens (without Meta Tokens) and patches of the item, by its size.
        """
        return self._threads.submit(self._row_item, int(number), prompt)

    def blank_item(self, prompt: tuple[int, int], layout: Layout) -> RowItem:
        """Return a placeholder of this size, for the slot of an item that failed."""
        tokens, patches = prompt
        positions, visual = np.tile(np.arange(tokens, dtype=np.int32), (layout.position_axes, 1)), np.full(tokens, -1, np.int32)
        example = Example(np.zeros(tokens, np.int32), positions, visual, {}, np.zeros(patches, bool))
        return RowItem(example, self._meta, self._budget)

    def _size(self, number: int) -> Fitted:
        name = self._name(number)
        item = as_item(self._describe(number), name) if self._describe else self._read(number)
        if self._describe is None and item.get("image") is None:
            example = self._held[number] = self._make(item, name=name)
            return Fitted(len(example.tokens), 0, example.cut)
        if self._describe is None:
            self._held[number] = item
        size = self._image_sizes[number] = self._size_of_image(item, number)
        return self._processor.size(item | {"image": size} if size[0] else item, self._side, name=name)

    def _row_item(self, number: int, prompt: tuple[int, int]) -> RowItem:
        held = self._held.pop(number, None)
        if not isinstance(held, Example):
            if held is None and self._describe is None:  # another host has read its size
                held = self._read(number)
            with self._memory.hold(self._image_bytes(number, held)):
                held = self._make(self._read(number) if held is None else held, name=self._name(number))
        if (len(held.tokens), held.patches) != prompt:  # its slot has room for the size that was read before
            raise UserError(f"{self._name(number)}: was changed while it was read; try again when it is complete")
        return RowItem(held, self._meta, self._budget)

    def _image_bytes(self, number: int, held: dict | None) -> int:
        """Return the bytes of an item's image when it is decoded."""
        if number not in self._image_sizes:
            item = held if self._describe is None else as_item(self._describe(number), self._name(number))
            self._image_sizes[number] = self._size_of_image(item or {}, number)
        return decoded_bytes(self._image_sizes.pop(number))

    def _size_of_image(self, item: dict, number: int) -> ImageSize:
        """Return the size of an item's image; (0, 0) if it has none."""
        return (0, 0) if item.get("image") is None else image_size(item["image"], self._name(number))

    def _read(self, number: int) -> dict:
        with self._lock:
            return as_item(self._items[number], self._name(number))


def as_table(sizes: Sequence[Fitted], rows: int) -> Int[np.ndarray, "N 4"]:
    """Return sizes as integers, padded with zeros to `rows` rows."""
    table = np.zeros((rows, len(Fitted._fields)), np.int32)
    table[: len(sizes)] = np.array(sizes, np.int32).reshape(-1, table.shape[1])
    return table


def as_item(item: str | Image.Image | dict, name: str = "item") -> dict:
    """Return a text, a PIL image or a dict as a dict.

    Args:
      name: name of the item in errors.

    Raises:
      UserError: the item has another type.
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
