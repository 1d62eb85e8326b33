"""Prepared sources to training batches: batch n is a pure function of (config, n).

`mixture` says which rows of which sources a step has; here they are read, their images decoded, and `slots` puts the items into
arrays of fixed shapes.

A source is a sequence of records (see `sources.records`). Where it has a method `compose(row, epoch, step)`, that makes the record
instead of `source[row]`, so that a source can draw or vary its records, still as a pure function.

B pairs, K negatives a pair, N items of a side, M microbatches, b items of a microbatch.
"""

import dataclasses
import signal
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import Int
from ml_collections import ConfigDict

from metaembed_jax.data.mixture import Reference, mixture
from metaembed_jax.data.slots import Slots, fill, slots
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import Layout
from metaembed_jax.processes import end_with_parent

AHEAD = 2  # batches that a thread makes before they are asked for


def training_batches(
    config: ConfigDict,
    architecture: object,
    processor: object,
    sources: Sequence[Sequence],
    rows: Int[np.ndarray, " n"] | None = None,
) -> grain.MapDataset:
    """The dataset whose element n is the global batch of step n, or this host's part of it.

    Args:
      architecture: the family's `Config`.
      processor: the family's `Processor`.
      sources: one for each entry of `config.data.sources`, in its order.
      rows: of each microbatch, those that this host makes; all by default.

    Returns:
      Elements {"query": side, "candidate": side, "negative_mask": bool [B, K], "source": int32 [B]}. A pair that has fewer than K
      negatives of its own has false in their place. A side is {"groups": (dict of [M, b, ...] arrays for each shape class, ...),
      "order": int32 [N]}: the vectors of all groups, flattened to M*b rows each and put one after the other, are in pair order when
      indexed by `order`. Queries are B; candidates are B positives, then B*K negatives, pair by pair. `b` is
      the number of `rows`, and `order` that of the global batch.

    Raises:
      UserError: as `mixture` and `slots`.
    """
    multiple = architecture.patch_multiple
    rows = np.arange(config.microbatch_size) if rows is None else rows
    pairs, items = config.batch_size, config.batch_size * (1 + config.data.negatives)
    queries = slots(config, "query_shapes", pairs, multiple, rows)
    candidates = slots(config, "candidate_shapes", items, multiple, rows)
    make = _BatchMaker(
        processor=processor,
        layout=architecture.layout,
        sources=tuple(sources),
        names=tuple(name for name, *_ in config.data.sources),
        negatives=config.data.negatives,
        queries=queries,
        candidates=candidates,
    )
    return mixture(config, sources, (*queries.room, *candidates.room)).map_with_index(make)


def iterate(dataset: grain.MapDataset, start: int, stop: int, workers: int = 0) -> Iterator[dict]:
    """Batches start .. stop-1 in order, made ahead of their use.

    Args:
      workers: processes that make them, each of them holding two; 0 for a thread of this process.

    Raises:
      UserError: what making a batch raises, or a process that was ended from outside.
    """
    chosen = dataset.slice(slice(start, stop))
    if workers:
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags of its own, which nobody parses here
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = iter(chosen.to_iter_dataset(grain.ReadOptions(num_threads=0)).mp_prefetch(options, worker_init_fn=_start_worker))
    else:
        batches = iter(chosen.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
    try:
        yield from batches
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise UserError(
            f"one of config.data.workers={workers} processes that make batches was ended from outside, most often for want of "
            "memory: lower it, or free memory (in a container also /dev/shm, through which batches pass)"
        ) from error
    finally:
        batches.close()


def _start_worker(worker: int, workers: int) -> None:
    """Ends a worker with its parent, and with nothing else: grain's would outlive one that was killed, and keep its memory.

    A scheduler's SIGTERM, and Ctrl-C, come to all processes of a run; the parent still needs batches for the step it saves after.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
    """Reads the records of a step and puts their items into arrays of fixed shapes."""

    processor: object
    layout: Layout
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
            "query": fill(queries, self.processor.query, self.queries, self.layout),
            "candidate": fill(positives + negatives, self.processor.candidate, self.candidates, self.layout),
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
