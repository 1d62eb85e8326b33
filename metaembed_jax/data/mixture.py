"""The pairs of each step, as references: step n is a pure function of (config, n), and no record is read.

Each source is shuffled every epoch, repeated without a gap, and divided into sub-batches. `balanced_schedule` chooses the source of
each sub-batch of a step. A step has no pair twice.

S sources.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from metaembed_jax.config.run import DataConfig, RunConfig
from metaembed_jax.data.source_schedule import balanced_schedule
from metaembed_jax.errors import UserError


class Reference(NamedTuple):
    """A record, before it is read."""

    source: int
    epoch: int
    row: int


def mixture(config: RunConfig, sources: Sequence[Sequence], sizes_S2: Int[np.ndarray, "S 2"]) -> grain.MapDataset:
    """Return the dataset whose element n is the references of step n, sub-batch by sub-batch.

    Args:
      sources: one for each entry of `config.data.sources`, in its order; `check_mixture` accepts them.
      sizes_S2: mean tokens and patches of a source's pairs.

    Raises:
      UserError: a step takes more pairs of a source than it has.
    """
    sub_batch = config.data.sub_batch or config.rows.batch_size
    names, weights, caps = zip(*config.data.sources, strict=True)
    used = [_used_pairs(source, cap) for source, cap in zip(sources, caps, strict=True)]
    chosen = balanced_schedule(weights, sizes_S2, config.rows.batch_size // sub_batch, config.schedule.steps)
    counts, streams = _counts_before(chosen), []
    for number, (name, source, cap) in enumerate(zip(names, sources, used, strict=True)):
        taken = (chosen == number).sum(axis=1) * sub_batch
        if (most := int(taken.max(initial=0))) > cap:
            raise UserError(
                f"source {name!r}: a step of config.rows.batch_size={config.rows.batch_size} takes up to {most} pairs of it, by "
                f"its weight; expected at most the {cap} that are used, or a step would have a pair twice: lower "
                "config.rows.batch_size or the weight, or add pairs"
            )
        streams.append(_SourceRows(number, len(source), cap, config.seed, np.concatenate([[0], np.cumsum(taken)])))

    def step(number: int) -> list[Reference]:
        sub_batches = zip(chosen[number].tolist(), counts[number].tolist(), strict=True)
        return [reference for source, count in sub_batches for reference in streams[source].take(count * sub_batch, sub_batch)]

    return grain.MapDataset.range(config.schedule.steps).map(step)


def check_mixture(data: DataConfig, batch_size: int, sources: Sequence[Sequence]) -> None:
    """Check that the sources fill whole sub-batches, and sub-batches whole steps.

    Raises:
      UserError: a source has fewer pairs than a sub-batch, or the batch is not a multiple of it.
    """
    sub_batch = data.sub_batch or batch_size
    if batch_size % sub_batch:
        raise UserError(f"config.rows.batch_size={batch_size}: expected a multiple of config.data.sub_batch={sub_batch}")
    for (name, _, cap), source in zip(data.sources, sources, strict=True):
        if not len(source):
            raise UserError(f"source {name!r} has no training records")
        if (pairs := _used_pairs(source, cap)) < sub_batch:
            key = "data.sub_batch" if data.sub_batch else "rows.batch_size"
            used = f"uses {pairs} training pairs" if cap and cap < len(source) else f"has {pairs} training pairs"
            raise UserError(
                f"source {name!r} {used}; expected at least config.{key}={sub_batch}, or a pair would be its own negative: "
                f"lower config.{key}, or add pairs"
            )


def _used_pairs(source: Sequence, cap: int | None) -> int:
    return min(cap or len(source), len(source))


def _counts_before(chosen: Int[np.ndarray, "steps sub_batches"]) -> Int[np.ndarray, "steps sub_batches"]:
    """Return the number of earlier sub-batches of each sub-batch's source."""
    flat = chosen.ravel()
    counts = np.zeros(len(flat), np.int64)
    for source in np.unique(flat):
        is_source = flat == source
        counts[is_source] = np.arange(is_source.sum())
    return counts.reshape(chosen.shape)


class _SourceRows:
    """The rows of a source, epoch after epoch, none of them twice in a step.

    Every epoch has the same `cap` rows of the source, in another order: that of grain's `MapDataset.shuffle`, without its cost for
    each element. Where a step ends an epoch and starts another, rows of the new epoch that the step already has are exchanged with
    the first ones after the step.

    Args:
      starts: the position at which each step begins, then the end of the last step.
    """

    def __init__(self, source: int, rows: int, cap: int, seed: int, starts: Int[np.ndarray, " n"]):
        self._source, self._cap, self._starts = source, cap, starts
        self._order_seed, choice_seed = np.random.SeedSequence([seed, source]).generate_state(2).tolist()
        self._chosen = np.random.default_rng(choice_seed).permutation(rows)[:cap] if cap < rows else None
        self._exchanges: list[dict[int, int]] = [{}]  # of each epoch so far: the index to read in place of an index

    def take(self, first: int, count: int) -> list[Reference]:
        """Return the references of `count` positions from `first` on."""
        drawn = []
        for position in range(first, first + count):
            epoch, index = divmod(position, self._cap)
            row = self._row(epoch, index)
            drawn.append(Reference(self._source, epoch, row if self._chosen is None else int(self._chosen[row])))
        return drawn

    def _row(self, epoch: int, index: int) -> int:
        exchanges = self._exchanges  # several threads may read and extend it, with the same entries
        while len(exchanges) <= epoch:
            exchanges = self._exchanges = [*exchanges, self._exchange(len(exchanges), exchanges[-1])]
        return self._shuffled(epoch, exchanges[epoch].get(index, index))

    def _exchange(self, epoch: int, before: dict[int, int]) -> dict[int, int]:
        """Return the exchanged indices of an epoch.

        Args:
          before: those of the epoch before.
        """
        boundary = epoch * self._cap
        step = int(np.searchsorted(self._starts, boundary)) - 1
        if step + 1 == len(self._starts) or self._starts[step + 1] == boundary:
            return {}
        first, end = (int(start) - boundary for start in self._starts[step : step + 2])
        tail = range(self._cap + first, self._cap)
        in_step = {self._shuffled(epoch - 1, before.get(index, index)) for index in tail}
        repeated = [index for index in range(end) if self._shuffled(epoch, index) in in_step]
        others = (index for index in range(end, self._cap) if self._shuffled(epoch, index) not in in_step)
        exchanges = {}
        for index, other in zip(repeated, others, strict=False):
            exchanges |= {index: other, other: index}
        return exchanges

    def _shuffled(self, epoch: int, index: int) -> int:
        return _shuffled_row(index, self._cap, self._order_seed + epoch)


@functools.lru_cache(maxsize=1 << 14)  # of few rows, one takes grain milliseconds
def _shuffled_row(index: int, rows: int, seed: int) -> int:
    """Return the row at an index of a shuffled epoch. A function of this module can be pickled; grain's cannot."""
    return index_shuffle(index, max_index=rows - 1, seed=seed % 2**32, rounds=4)
