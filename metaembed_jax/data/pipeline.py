"""Prepared sources to training batches: batch n is a pure function of (config, n).

The order of everything is decided on references (source, epoch, row) by grain, which makes it random access: each source is
shuffled anew every epoch and repeated without a gap, cut into sub-batches of one microbatch, and the sub-batches of all sources
are mixed by weight. So a sub-batch is of one source, and nothing of a source is left out. Only then are records read and images
decoded.

A source is a sequence of records (see `sources.records`). Where it has a method `compose(row, epoch, step)`, that makes the record
instead of `source[row]`, so that a source can draw or vary its records, still as a pure function.

B pairs, K negatives a pair, N items of a side, M microbatches, b items of a microbatch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from metaembed_jax.data.prompts import BLANK, Example, Processor, ShapeClass, collate
from metaembed_jax.errors import UserError


class Reference(NamedTuple):
    """A record that has not been read yet."""

    source: int
    epoch: int
    row: int


def training_batches(
    config: ConfigDict, processor: Processor, sources: Sequence[Sequence], rows: Int[np.ndarray, " n"] | None = None
) -> grain.MapDataset:
    """The dataset whose element n is the global batch of step n, or this host's part of it.

    Args:
      sources: one for each entry of `config.data.sources`, in its order.
      rows: of each microbatch, those that this host makes; all by default.

    Returns:
      Elements {"query": side, "candidate": side, "negative_mask": bool [B, K], "source": int32 [B]}. A pair that has fewer than K
      negatives of its own has false in their place. A side is {"groups": (dict of [M, b, ...] arrays for each shape class, ...),
      "order": int32 [N]}: the vectors of all groups, flattened to M*b rows each and put one after the other, are in pair order when
      indexed by `order`. Queries are B; candidates are B positives, then B*K negatives, pair by pair. `b` is
      the number of `rows`, and `order` that of the global batch.

    Raises:
      UserError: a source is empty, a weight is not positive, or sizes in the config do not divide or are no whole windows.
    """
    items, sub_batch = config.batch_size, config.data.sub_batch or config.microbatch_size
    if items % sub_batch:
        raise UserError(f"config.batch_size={items} must be a multiple of config.data.sub_batch={sub_batch}")
    names, weights, caps = zip(*config.data.sources, strict=True)
    for name, weight, source in zip(names, weights, sources, strict=True):
        if not weight > 0:
            raise UserError(f"config.data.sources: the weight of {name!r} is {weight}; it must be positive")
        if not len(source):
            raise UserError(f"source {name!r} has no training records")
    used = [min(cap or len(source), len(source)) for cap, source in zip(caps, sources, strict=True)]
    references = [_references(number, len(source), used[number], config.seed) for number, source in enumerate(sources)]
    sub_batches = [ordered.batch(sub_batch, batch_fn=list) for ordered in references]
    mixed = grain.MapDataset.mix(sub_batches, [float(weight) for weight in weights])
    window = (processor.image_config.window_units * processor.image_config.merge_size) ** 2
    rows = np.arange(config.microbatch_size) if rows is None else rows
    steps = mixed.batch(items // sub_batch, batch_fn=lambda sub_batches: sum(sub_batches, []))
    make = _BatchMaker(
        processor=processor,
        sources=tuple(sources),
        names=names,
        negatives=config.data.negatives,
        queries=slots(config, "query_shapes", items, window, rows),
        candidates=slots(config, "candidate_shapes", items * (1 + config.data.negatives), window, rows),
    )
    return steps.map_with_index(make)


def iterate(dataset: grain.MapDataset, start: int, stop: int, threads: int = 1, ahead: int = 2) -> Iterator[dict]:
    """Batches start .. stop-1 in order, made by `threads` in the background, `ahead` of their use."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(dataset.slice(slice(start, stop)).to_iter_dataset(options))


def _references(source: int, rows: int, cap: int, seed: int) -> grain.MapDataset:
    """`cap` rows of a source, the same in every epoch (all, if it has no more), in an order of their own, for ever."""
    order_seed, choice_seed = np.random.SeedSequence([seed, source]).generate_state(2).tolist()
    chosen = np.random.default_rng(choice_seed).permutation(rows)[:cap] if cap < rows else np.arange(rows)
    shuffled = grain.MapDataset.range(cap).shuffle(seed=order_seed).repeat()
    return shuffled.map_with_index(lambda position, row: Reference(source, position // cap, int(chosen[row])))


class Slots(NamedTuple):
    """The rows that one side of every batch has.

    Attributes:
      shapes: the shape classes, in the config's order (smallest first).
      microbatches: M of each class.
      size: items of a microbatch, over all hosts.
      rows: of each microbatch, those that this host makes.
    """

    shapes: tuple[ShapeClass, ...]
    microbatches: tuple[int, ...]
    size: int
    rows: Int[np.ndarray, " n"]


def slots(config: ConfigDict, key: str, items: int, window: int, here: Int[np.ndarray, " n"]) -> Slots:
    """Reads shape classes (tokens, patches) or (tokens, patches, rows); `items` are those of a side, `window` patches of one.

    Without the third number a class has room for all items, so that any mixture fits, at the price of empty rows where there are
    several classes; with it, a step has exactly that many rows of the class.

    Raises:
      UserError: sizes that do not divide, are no whole windows, or hold too few items.
    """
    shapes, size = config.data[key], config.microbatch_size
    rows = [shape[2] if len(shape) == 3 else items for shape in shapes]
    if any(count % size for count in rows):
        raise UserError(f"config.data.{key}: rows {rows} must be multiples of microbatch_size={size}")
    for _, patches, *_ in shapes:
        if patches % window:
            raise UserError(f"config.data.{key}: {patches} patches are not whole windows of {window}, as this model has them")
    if sum(rows) < items:
        raise UserError(f"config.data.{key}: {sum(rows)} rows in all do not hold the {items} items of a batch")
    return Slots(tuple(ShapeClass(*shape[:2]) for shape in shapes), tuple(count // size for count in rows), size, here)


def place(fits_NC: Bool[np.ndarray, "N C"], room: Sequence[int]) -> Int[np.ndarray, "N 2"]:
    """Gives every item a class that fits and a row in it: the first such class with room, choosiest items first.

    Returns:
      (class, row in the class) of each item; class -1 for an item that finds no place.
    """
    places_N2 = np.full((len(fits_NC), 2), -1)
    taken = [0] * len(room)
    for item in np.argsort(fits_NC.sum(axis=1), kind="stable"):
        for shape in np.flatnonzero(fits_NC[item]):
            if taken[shape] < room[shape]:
                places_N2[item] = shape, taken[shape]
                taken[shape] += 1
                break
    return places_N2


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
    """Reads the records of a step and puts their items into arrays of fixed shapes."""

    processor: Processor
    sources: tuple[Sequence, ...]
    names: tuple[str, ...]
    negatives: int
    queries: Slots
    candidates: Slots

    def __call__(self, step: int, references: list[Reference]) -> dict:
        records = [self._read(reference, step) for reference in references]
        labels = [f"source {self.names[reference.source]!r}, row {reference.row}" for reference in references]
        queries = [(record["query"], f"{label}, query") for record, label in zip(records, labels, strict=True)]
        positives = [(record["positive"], f"{label}, positive") for record, label in zip(records, labels, strict=True)]
        negatives = [item for record, label in zip(records, labels, strict=True) for item in self._negatives(record, label)]
        mask = np.array([item is not None for item in negatives], bool).reshape(len(records), self.negatives)
        return {
            "negative_mask": mask,
            "source": np.array([reference.source for reference in references], np.int32),
            "query": _side(queries, self.processor.query, self.queries, self.processor),
            "candidate": _side(positives + negatives, self.processor.candidate, self.candidates, self.processor),
        }

    def _read(self, reference: Reference, step: int) -> dict:
        source = self.sources[reference.source]
        if hasattr(source, "compose"):
            return source.compose(reference.row, reference.epoch, step)
        return source[reference.row]

    def _negatives(self, record: dict, label: str) -> list[tuple[dict, str] | None]:
        """The first K of a record; None in place of those that it lacks."""
        found = [(item, f"{label}, negative {number}") for number, item in enumerate(record.get("negatives", ()))]
        return (found + [None] * self.negatives)[: self.negatives]


def _side(items: list[tuple[dict, str] | None], encode: Callable, slots: Slots, processor: Processor) -> dict:
    """Places the items of one side and collates each shape class. What is None has any place, and there is nothing for it."""
    longest = max(shape.tokens for shape in slots.shapes)
    room = [count * slots.size for count in slots.microbatches]

    def example(item: int) -> Example:
        content, name = items[item]
        return encode(content, max_tokens=longest, name=name)

    if len(slots.shapes) == 1:  # every host knows the places without looking at the other hosts' items
        examples = {}
        places_N2 = np.stack([np.zeros(len(items), int), np.arange(len(items))], axis=1)
    else:
        examples = {number: example(number) for number, item in enumerate(items) if item is not None}
        sizes_N2 = np.array([_size(one) for one in examples.values()])
        places_N2 = np.zeros((len(items), 2), int)
        places_N2[list(examples)] = place((sizes_N2[:, None] <= np.array(slots.shapes)).all(axis=-1), room)

    taken = {tuple(places_N2[number].tolist()): number for number, item in enumerate(items) if item is not None}
    if lost := [item for item, (shape, _) in enumerate(places_N2.tolist()) if shape < 0]:
        raise UserError(_no_place(items[lost[0]][1], examples[lost[0]], slots, room))
    groups = []
    for number, (shape, microbatches) in enumerate(zip(slots.shapes, slots.microbatches, strict=True)):
        rows = np.arange(microbatches * slots.size).reshape(microbatches, slots.size)[:, slots.rows]
        chosen = [taken.get((number, row)) for row in rows.ravel().tolist()]
        made = [BLANK if item is None else examples.get(item) or example(item) for item in chosen]
        for item, one in zip(chosen, made, strict=True):
            if item is not None and any(np.array(_size(one)) > shape):
                raise UserError(_no_place(items[item][1], one, slots, room))
        arrays = collate(made, shape, 3 * processor.image_config.patch_size**2)
        groups.append({key: value.reshape(*rows.shape, *value.shape[1:]) for key, value in arrays.items()})
    first_row = np.concatenate([[0], np.cumsum(room)])
    return {"groups": tuple(groups), "order": (first_row[places_N2[:, 0]] + places_N2[:, 1]).astype(np.int32)}


def _size(example: Example) -> tuple[int, int]:
    return len(example.tokens), 0 if example.patches is None else len(example.patches.mask)


def _no_place(name: str, example: Example, slots: Slots, room: list[int]) -> str:
    tokens, patches = _size(example)
    classes = zip(slots.shapes, room, strict=True)
    held = ", ".join(f"{shape.tokens} tokens and {shape.patches} patches x {rows} rows" for shape, rows in classes)
    return (
        f"{name}: {tokens} tokens and {patches} patches find no place in the batch's shape classes ({held}): "
        "enlarge one or lower max_pixels"
    )
