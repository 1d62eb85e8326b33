"""Encoding of items. Calls of the schedule are decoded ahead, and sent before the vectors of earlier calls are fetched.

Each block has calls of its own, which depend on its items alone; decoding runs ahead over the borders of blocks. An item that fails
when its size is read is in no call. If it fails when it is decoded, its slot holds a blank item of the same size.

N items, n items of this host, V vectors of a row, R vectors of an item, D width of a vector.
"""

import contextlib
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm

from metaembed_jax import hosts
from metaembed_jax.batch import rows
from metaembed_jax.batch.items import Fitted, Size
from metaembed_jax.batch.rows import RowItem
from metaembed_jax.compilation import announced
from metaembed_jax.encoding.blocks import EncodedBlock, PendingBlock
from metaembed_jax.encoding.reading import FAILED, Reader, as_table
from metaembed_jax.encoding.schedule import Call, Schedule
from metaembed_jax.errors import UserError
from metaembed_jax.hosts.shares import share
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.network import ModelConfig
from metaembed_jax.sharding import batch_shards, fetch_rows, rows_here, rows_owned

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

    def add(self, sizes_N4: Int[np.ndarray, "N 4"]) -> None:
        """Count items by their sizes, rows of `Fitted`."""
        self.items += len(sizes_N4)
        self.cut += int((sizes_N4[:, 2] > 0).sum())
        self.shrunk += int(sizes_N4[:, 3].sum())

    def __str__(self) -> str:
        counts = [f"{self.cut:,} texts cut"] * bool(self.cut) + [f"{self.shrunk:,} images shrunk"] * bool(self.shrunk)
        return f"of {self.items:,} items, {' and '.join(counts)} to fit a row (config.rows.size, config.data.max_text_tokens)"

    def __bool__(self) -> bool:
        return bool(self.cut or self.shrunk)


class Decoding(NamedTuple):
    """A call whose items are being decoded.

    Attributes:
      call: the call.
      block: the block of its items.
      here: the numbers of the items of each of this host's rows.
      items: a future `RowItem` of each of them.
    """

    call: Call
    block: PendingBlock
    here: list[list[int]]
    items: list[list[Future]]


class Running(NamedTuple):
    """A call that the devices compute.

    Attributes:
      call, block, here: as in `Decoding`.
      vectors: the vectors of all rows.
    """

    call: Call
    block: PendingBlock
    here: list[list[int]]
    vectors: Float[jax.Array, "B V D"]


S = TypeVar("S")
T = TypeVar("T")
Started = TypeVar("Started", Decoding, Running)


@dataclasses.dataclass
class _ItemStream:
    """The items of a call of `Encoder.blocks`.

    Attributes:
      reader: reads them.
      side, budget, size, allow_failures: as for `Encoder.blocks`.
      blocks: the blocks that have started and are not yielded yet.
    """

    reader: Reader
    side: str
    budget: int
    size: int | None
    allow_failures: bool
    blocks: deque[PendingBlock] = dataclasses.field(default_factory=deque)

    def complete(self) -> Iterator[EncodedBlock]:
        """Yield the next blocks that are complete."""
        while self.blocks and self.blocks[0].is_complete:
            block = self.blocks.popleft()
            yield block.join_without_failures() if self.allow_failures else block.join()

    def results(
        self, block: PendingBlock, numbers: Sequence[int], futures: Sequence[Future], instead: Callable[[int], T]
    ) -> list[T]:
        """Return the results of futures of items. If failures are allowed, they are recorded, and `instead` replaces the result.

        Raises:
          UserError: the first failure, if they are not allowed.
        """
        results = []
        for number, future in zip(numbers, futures, strict=True):
            try:
                results.append(future.result())
            except UserError as error:
                if not self.allow_failures:
                    raise
                block.failures[int(number)] = str(error)
                results.append(instead(number))
        return results


class Encoder:
    """Packs items into rows and runs the network on them.

    Args:
      config: config of the network.
      processor: processor of the family; its limits are those of a row.
      mesh: devices that encode.
      encode: the result of `network.make_encode`.
      width: D.

    Attributes:
      programs: (rows, capacity of a row) of each program that has run.
      reduced: counts of the last call of `blocks`.
    """

    def __init__(self, config: ModelConfig, processor: PromptProcessor, mesh: Mesh, encode: Callable, width: int):
        self._config, self._processor, self._mesh, self._encode, self._width = config, processor, mesh, encode, width
        self.programs: set[tuple[int, Size]] = set()
        self.reduced, self._printed = Reduced(), set()

    def blocks(
        self,
        parameters: dict,
        items: Sequence,
        side: str,
        budget: int,
        *,
        size: int | None = None,
        start: int = 0,
        bar: tqdm | None = None,
        allow_failures: bool = False,
    ) -> Iterator[EncodedBlock]:
        """Encode items from `start` on, and yield blocks of consecutive items, in order, each as soon as it is complete.

        All hosts must call this with the same items. They run the same calls, and each host decodes the items of its rows.

        Args:
          side: "query" or "document".
          budget: vectors of each item; if all states are read, the most of an item, and zeros follow its last.
          size: items of a block; the last may have fewer. By default, all items are one block.
          start: number of the first item.
          bar: advances by the items of all hosts.
          allow_failures: report items that cannot be encoded in `failures` of their block, and encode the others.

        Raises:
          UserError: an item cannot be encoded, which the error names; or its vectors are not finite.
        """
        self.reduced = Reduced()
        meta, read = self._config.meta_tokens(side, budget), self._read(budget)
        with contextlib.closing(Reader(self._processor, items, side, meta, read)) as reader:
            stream = _ItemStream(reader, side, budget, size, allow_failures)
            for running in self._run(parameters, self._calls(stream, range(start, len(items)), bar), stream):
                self._fetch(running, budget)
                _advance(bar, sum(map(len, running.call.rows)))
                yield from stream.complete()
            yield from stream.complete()
        if self.reduced and str(self.reduced) not in self._printed and hosts.is_first():
            self._printed.add(str(self.reduced))
            tqdm.write(f"{side}: {self.reduced}", file=sys.stderr)

    def _calls(self, stream: _ItemStream, numbers: range, bar: tqdm | None) -> Iterator[tuple[Call, PendingBlock]]:
        """Yield the calls of all blocks. The sizes of the next chunk of items are read meanwhile."""
        meta, row = self._config.meta_tokens(stream.side, stream.budget), self._row(stream.side)
        shards = batch_shards(self._mesh)
        chunks = _chunks(numbers, stream.size or max(len(numbers), 1), CHUNK_ITEMS * shards)
        for (items, chunk), futures in _one_ahead(chunks, lambda ahead: stream.reader.sizes(share(ahead[1]))):
            if chunk.start == items.start:
                stream.blocks.append(PendingBlock(items, (stream.budget, self._width)))
                schedule = Schedule(*row, meta, self._read(stream.budget), shards)
            block, is_last = stream.blocks[-1], chunk.stop == items.stop
            sizes = stream.results(block, share(chunk), futures, lambda _: FAILED)
            numbers_N, sizes_N4 = block.add_sizes(chunk, _gather_sizes(sizes, len(chunk)))
            _advance(bar, len(chunk) - len(numbers_N))
            self.reduced.add(sizes_N4)
            schedule.add(numbers_N, sizes_N4[:, :2])
            if schedule.is_full or is_last:
                yield from ((call, block) for call in schedule.take(is_last))

    def _read(self, budget: int) -> int | None:
        """Return the Meta Tokens of an item that are read; None if all states are."""
        return None if self._config.reads_states else budget

    def _row(self, side: str) -> tuple[int, int]:
        """Return the tokens and patches of a row. They are the same for every budget, and the processor makes items that fit."""
        limits = self._processor.limits
        if limits is None:
            return self._config.architecture.default_row(self._processor.images)
        meta = self._config.meta_tokens(side, self._config.vectors(side))
        return max(limits.tokens, limits.prompt(side) + meta), limits.patches

    def _run(self, parameters: dict, calls: Iterator[tuple[Call, PendingBlock]], stream: _ItemStream) -> Iterator[Running]:
        """Yield calls whose vectors are due."""
        shards = batch_shards(self._mesh)
        decoding = _ahead((self._decode(call, block, stream.reader) for call, block in calls), AHEAD * shards)
        return _ahead((self._send(parameters, call, stream) for call in decoding), IN_FLIGHT * shards)

    def _decode(self, call: Call, block: PendingBlock, reader: Reader) -> Decoding:
        here = [call.rows[row] if row < len(call.rows) else [] for row in rows_here(self._mesh, call.size)]
        return Decoding(call, block, here, [[reader.row_item(number, block.prompt(number)) for number in row] for row in here])

    def _send(self, parameters: dict, decoding: Decoding, stream: _ItemStream) -> Running:
        call, block, here, futures = decoding
        layout, program = self._config.architecture.layout, (call.size, call.row)

        def blank(number: int) -> RowItem:
            return stream.reader.blank_item(block.prompt(number), layout)

        items = [stream.results(block, numbers, row, blank) for numbers, row in zip(here, futures, strict=True)]
        batch = rows.collate(items, call.row, layout)
        with jax.set_mesh(self._mesh):
            batch = rows.put(batch, self._mesh)
            with contextlib.nullcontext() if program in self.programs else announced("the encoder"):
                vectors_BVD = self._encode(parameters, batch)
        self.programs.add(program)
        return Running(call, block, here, vectors_BVD)

    def _fetch(self, running: Running, budget: int) -> None:
        """Put the vectors of a call into its block."""
        call, block, here, vectors = running
        vectors_bVD, rows_b = fetch_rows(vectors), rows_here(self._mesh, call.size)
        owned = set(rows_owned(self._mesh, call.size).tolist())
        read, slots = self._read(budget), []
        for row, items in enumerate(here):
            first = 0
            for number in items:
                count = block.prompt(number)[0] if read is None else read
                if rows_b[row] in owned and number not in block.failures:
                    slots.append((number, row, first, count))
                first += count
        vectors_nRD = np.zeros((len(slots), budget, vectors_bVD.shape[2]), np.float32)
        for item, (_, row, first, count) in enumerate(slots):
            vectors_nRD[item, :count] = vectors_bVD[row, first : first + count]
        numbers_n = np.array([number for number, *_ in slots], np.int64)
        if len(bad := numbers_n[~np.isfinite(vectors_nRD).all(axis=(1, 2))]):  # a maximum may hide NaN
            raise UserError(f"item {bad.min()}: its vectors hold NaN or infinities; check the checkpoint")
        block.add_vectors(sum(map(len, call.rows)), numbers_n, vectors_nRD)


def _chunks(numbers: range, size: int, count: int) -> Iterator[tuple[range, range]]:
    """Yield (items of a block, at most `count` of them whose sizes are read together), in order."""
    for first in range(0, len(numbers), size):
        items = numbers[first : first + size]
        yield from ((items, items[start : start + count]) for start in range(0, len(items), count))


def _one_ahead(inputs: Iterable[S], begin: Callable[[S], T]) -> Iterator[tuple[S, T]]:
    """Yield (input, what `begin` returns for it). It has then begun for the next input."""
    begun = deque()
    for value in inputs:
        begun.append((value, begin(value)))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


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


def _gather_sizes(sizes: Sequence[Fitted], count: int) -> Int[np.ndarray, "N 4"]:
    """Gather the sizes of a chunk's items; every host has read a share."""
    each = -(-count // hosts.count_hosts())
    table_HN4 = hosts.gather(as_table(sizes, each))
    return table_HN4.swapaxes(0, 1).reshape(-1, table_HN4.shape[2])[:count]


def _advance(bar: tqdm | None, items: int) -> None:
    if bar is not None:
        bar.update(items)
