"""Encoding of items. Calls of the schedule are decoded ahead, and sent before the vectors of earlier calls are fetched.

N items, V vectors of a row, R vectors of an item, D width of a vector.
"""

import contextlib
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.batch import rows
from metaembed_jax.batch.items import Size
from metaembed_jax.compilation import announced
from metaembed_jax.encoding.reading import Reader, as_table, results
from metaembed_jax.encoding.schedule import Call, Schedule
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.network import ModelConfig
from metaembed_jax.sharding import batch_shards, fetch_rows, rows_here

CHUNK_ITEMS = 64  # items of a shard whose sizes are read together
AHEAD = 32  # rows of a shard that are decoded ahead
IN_FLIGHT = 32  # rows of a shard that are sent before the vectors of earlier rows are fetched


@dataclasses.dataclass
class Reduced:
    """Counts of items that were made smaller to fit a row.

    Attributes:
      items: all items that were encoded.
      cut: texts whose end was cut.
      shrunk: images that are smaller than the family makes them without a limit.
    """

    items: int = 0
    cut: int = 0
    shrunk: int = 0

    def __str__(self) -> str:
        counts = [f"{self.cut:,} texts cut"] * bool(self.cut) + [f"{self.shrunk:,} images shrunk"] * bool(self.shrunk)
        return f"of {self.items:,} items, {' and '.join(counts)} to fit a row (config.rows.size, config.data.max_text_tokens)"

    def __bool__(self) -> bool:
        return bool(self.cut or self.shrunk)


class EncodedBlock(NamedTuple):
    """Vectors of this host's share of consecutive items.

    Attributes:
      items: the numbers of all items of the block.
      numbers: the numbers of this host's items, ascending.
      vectors: the vectors of each of this host's items.
    """

    items: range
    numbers: Int[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n R D"]


class Decoding(NamedTuple):
    """A call whose items are being decoded.

    Attributes:
      call: the call.
      here: the items of each of this host's rows.
      rows: a future of the arrays of each of these items.
    """

    call: Call
    here: list[list[int]]
    rows: list[list[Future]]


class Running(NamedTuple):
    """A call that the devices compute.

    Attributes:
      call: the call.
      here: the items of each of this host's rows.
      vectors: the vectors of all rows.
    """

    call: Call
    here: list[list[int]]
    vectors: Float[jax.Array, "B V D"]


Started = TypeVar("Started", Decoding, Running)


class Encoder:
    """Packs items into rows and runs the network on them.

    Args:
      config: config of the network.
      processor: processor of the family; its limits are those of a row.
      mesh: devices that encode.
      encode: the result of `network.make_encode`.

    Attributes:
      programs: (rows, capacity of a row) of each program that has run.
      reduced: counts of the last call of `blocks`.
    """

    def __init__(self, config: ModelConfig, processor: PromptProcessor, mesh: Mesh, encode: Callable):
        self._config, self._processor, self._mesh, self._encode = config, processor, mesh, encode
        self.programs: set[tuple[int, Size]] = set()
        self.reduced, self._printed = Reduced(), set()

    def blocks(
        self, parameters: dict, items: Sequence, side: str, budget: int, *, start: int, size: int, bar: tqdm | None = None
    ) -> Iterator[EncodedBlock]:
        """Encode items from `start` on, and yield blocks of consecutive items, in order, each as soon as it is complete.

        All hosts must call this with the same items. They run the same calls, and each host decodes the items of its rows.

        Args:
          side: "query" or "document".
          budget: vectors of each item.
          start: number of the first item.
          size: items of a block.
          bar: advances by the items of all hosts.

        Raises:
          UserError: an item cannot be encoded, which the error names.
        """
        self.reduced = Reduced()
        blocks = _Blocks(range(start, len(items)), size)
        with contextlib.closing(Reader(self._processor, items, side, self._config.meta_tokens(side, budget), budget)) as reader:
            calls = self._calls(reader, range(start, len(items)), side, budget)
            for numbers, here, vectors_nRD in self._run(parameters, calls, reader, budget):
                if bar is not None:
                    bar.update(len(numbers))
                yield from blocks.add(numbers, here, vectors_nRD)
        if self.reduced and str(self.reduced) not in self._printed and hosts.is_first():
            self._printed.add(str(self.reduced))
            tqdm.write(f"{side}: {self.reduced}", file=sys.stderr)

    def _calls(self, reader: Reader, numbers: range, side: str, budget: int) -> Iterator[Call]:
        meta = self._config.meta_tokens(side, budget)
        tokens, patches = self._row(side)
        shards = batch_shards(self._mesh)
        schedule, size = Schedule(tokens, patches, meta, budget, shards), CHUNK_ITEMS * shards
        chunks = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        started = self._start_sizes(reader, chunks[0]) if chunks else []
        for number, chunk in enumerate(chunks):
            table_N4 = _gather_sizes(results(started), len(chunk))
            started = self._start_sizes(reader, chunks[number + 1]) if number + 1 < len(chunks) else []
            self.reduced.items += len(chunk)
            self.reduced.cut += int((table_N4[:, 2] > 0).sum())
            self.reduced.shrunk += int(table_N4[:, 3].sum())
            schedule.add(np.array(chunk), table_N4[:, :2])
            if schedule.is_full or number + 1 == len(chunks):
                yield from schedule.take(is_last=number + 1 == len(chunks))

    def _row(self, side: str) -> tuple[int, int]:
        """Return the tokens and patches of a row. They are the same for every budget, and the processor makes items that fit."""
        limits = self._processor.limits
        if limits is None:
            return self._config.architecture.default_row(self._processor.images)
        meta = self._config.meta_tokens(side, self._config.vectors(side))
        return max(limits.tokens, limits.prompt(side) + meta), limits.patches

    def _start_sizes(self, reader: Reader, chunk: range) -> list[Future]:
        return reader.sizes(chunk[jax.process_index() :: hosts.count_hosts()])

    def _run(self, parameters: dict, calls: Iterator[Call], reader: Reader, budget: int) -> Iterator[tuple]:
        """Yield (numbers of a call's items, numbers of this host's items, their vectors) for each call."""
        shards = batch_shards(self._mesh)
        decoding = _ahead((self._decode(call, reader) for call in calls), AHEAD * shards)
        running = _ahead((self._send(parameters, call) for call in decoding), IN_FLIGHT * shards)
        for call in running:
            yield _fetch(call, budget)

    def _decode(self, call: Call, reader: Reader) -> Decoding:
        here = [call.rows[row] if row < len(call.rows) else [] for row in rows_here(self._mesh, call.size)]
        return Decoding(call, here, [reader.row_items(numbers) for numbers in here])

    def _send(self, parameters: dict, decoding: Decoding) -> Running:
        call = decoding.call
        layout, program = self._config.architecture.layout, (call.size, call.row)
        batch = rows.collate([results(row) for row in decoding.rows], call.row, layout)
        with jax.set_mesh(self._mesh):
            batch = rows.put(batch, self._mesh)
            with contextlib.nullcontext() if program in self.programs else announced("the encoder"):
                vectors_BVD = self._encode(parameters, batch)
        self.programs.add(program)
        return Running(call, decoding.here, vectors_BVD)


def _ahead(calls: Iterator[Started], rows: int) -> Iterator[Started]:
    """Yield calls in order. A call is yielded when later calls of at least `rows` rows have started, or all have."""
    started, waiting = deque(), 0
    for call in calls:
        started.append(call)
        waiting += call.call.size
        while waiting - started[0].call.size >= rows:
            waiting -= started[0].call.size
            yield started.popleft()
    yield from started


def _fetch(running: Running, budget: int) -> tuple[list[int], list[int], np.ndarray]:
    vectors_bVD = fetch_rows(running.vectors)
    numbers = [number for row in running.here for number in row]
    slots = [(row, rank * budget) for row, items in enumerate(running.here) for rank in range(len(items))]
    vectors_nRD = np.empty((len(numbers), budget, vectors_bVD.shape[2]), np.float32)
    for item, (row, first) in enumerate(slots):
        vectors_nRD[item] = vectors_bVD[row, first : first + budget]
    if len(bad := np.flatnonzero(~np.isfinite(vectors_nRD).all(axis=(1, 2)))):  # a maximum may hide NaN
        raise UserError(f"item {min(numbers[item] for item in bad)}: its vectors hold NaN or infinities; check the checkpoint")
    return [number for row in running.call.rows for number in row], numbers, vectors_nRD


def _gather_sizes(sizes: list, count: int) -> Int[np.ndarray, "N 4"]:
    """Gather the sizes of a chunk's items; every host has read a share."""
    each = -(-count // hosts.count_hosts())
    table_HN4 = hosts.gather(as_table(sizes, each))
    return table_HN4.swapaxes(0, 1).reshape(-1, table_HN4.shape[2])[:count]


class _Blocks:
    """Collects vectors in the order of calls into blocks of consecutive items."""

    def __init__(self, numbers: range, size: int):
        self._start, self._size = numbers.start, size
        self._waiting = deque(numbers[first : first + size] for first in range(0, len(numbers), size))
        self._missing = [len(block) for block in self._waiting]
        self._arrays: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self._waiting]
        self._next = 0

    def add(self, numbers: list[int], here: list[int], vectors_nRD: np.ndarray) -> Iterator[EncodedBlock]:
        """Add the vectors of a call, and yield the blocks that are complete.

        Args:
          numbers: numbers of the call's items on all hosts.
          here: numbers of this host's items.
          vectors_nRD: vectors of this host's items.
        """
        for block, count in zip(*np.unique(self._block(numbers), return_counts=True), strict=True):
            self._missing[block] -= count
        blocks_n = self._block(here)
        for block in np.unique(blocks_n):
            is_in_n = blocks_n == block
            self._arrays[block].append((np.array(here)[is_in_n], vectors_nRD[is_in_n]))
        while self._waiting and not self._missing[self._next]:
            yield self._join(self._waiting.popleft(), self._arrays[self._next], vectors_nRD.shape[1:])
            self._next += 1

    def _join(self, block: range, arrays: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]) -> EncodedBlock:
        numbers_n = np.concatenate([numbers for numbers, _ in arrays] or [np.zeros(0, np.int64)])
        order_n = np.argsort(numbers_n)
        slots_n = np.argsort(order_n)
        vectors_nRD, last = np.empty((len(numbers_n), *shape), np.float32), len(numbers_n)
        while arrays:  # an array is dropped as soon as it is copied, so that memory never holds all vectors twice
            numbers, vectors = arrays.pop()
            vectors_nRD[slots_n[last - len(numbers) : last]] = vectors
            last -= len(numbers)
        return EncodedBlock(block, numbers_n[order_n], vectors_nRD)

    def _block(self, numbers: list[int]) -> np.ndarray:
        return (np.array(numbers, np.int64) - self._start) // self._size
