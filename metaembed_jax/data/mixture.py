"""The pairs of each step, as references: step n is a pure function of (config, n), and no record is read.

Each source is shuffled every epoch, repeated without a gap, and divided into sub-batches. `balanced_schedule` chooses the source of
each sub-batch of a step.

S sources.
"""

from collections.abc import Callable, Sequence
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
    """
    sub_batch = config.data.sub_batch or config.rows.batch_size
    _, weights, caps = zip(*config.data.sources, strict=True)
    used = [min(cap or len(source), len(source)) for cap, source in zip(caps, sources, strict=True)]
    references = [_references(number, len(source), used[number], config.seed) for number, source in enumerate(sources)]
    chosen = balanced_schedule(weights, sizes_S2, config.rows.batch_size // sub_batch, config.schedule.steps)
    counts = _counts_before(chosen)

    def step(number: int) -> list[Reference]:
        sub_batches = zip(chosen[number].tolist(), counts[number].tolist(), strict=True)
        return [reference for source, count in sub_batches for reference in references[source](count * sub_batch, sub_batch)]

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
        if (pairs := min(cap or len(source), len(source))) < sub_batch:
            key = "data.sub_batch" if data.sub_batch else "rows.batch_size"
            used = f"uses {pairs} training pairs" if cap and cap < len(source) else f"has {pairs} training pairs"
            raise UserError(
                f"source {name!r} {used}; expected at least config.{key}={sub_batch}, or a pair would be its own negative: "
                f"lower config.{key}, or add pairs"
            )


def _counts_before(chosen: Int[np.ndarray, "steps sub_batches"]) -> Int[np.ndarray, "steps sub_batches"]:
    """Return the number of earlier sub-batches of each sub-batch's source."""
    flat = chosen.ravel()
    counts = np.zeros(len(flat), np.int64)
    for source in np.unique(flat):
        is_source = flat == source
        counts[is_source] = np.arange(is_source.sum())
    return counts.reshape(chosen.shape)


def _references(source: int, rows: int, cap: int, seed: int) -> Callable[[int, int], list[Reference]]:
    """Return a function of a position and a count to the references of the positions that follow.

    Every epoch has the same `cap` rows of the source, in another order: that of grain's `MapDataset.shuffle`, without its cost for
    each element.
    """
    order_seed, choice_seed = np.random.SeedSequence([seed, source]).generate_state(2).tolist()
    chosen = np.random.default_rng(choice_seed).permutation(rows)[:cap] if cap < rows else None

    def references(first: int, count: int) -> list[Reference]:
        drawn = []
        for position in range(first, first + count):
            epoch, index = divmod(position, cap)
            row = _shuffled(index, cap, order_seed + epoch)
            drawn.append(Reference(source, epoch, row if chosen is None else int(chosen[row])))
        return drawn

    return references


def _shuffled(index: int, rows: int, seed: int) -> int:
    """Return the row at an index of a shuffled epoch. A function of this module can be pickled; grain's cannot."""
    return index_shuffle(index, max_index=rows - 1, seed=seed % 2**32, rounds=4)
