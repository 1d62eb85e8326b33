"""Batches of training pairs: batch n is a pure function of (config, n).

`mixture` chooses the pairs of a step, and the sizes of their items assign them to rows. This host reads the records of its rows,
decodes their images, and collates them.

B pairs, K negatives a pair, I = 2 + K items of a pair, N items of a step, n rows of this host, W words
of a digest, V vectors of a row.
"""

import dataclasses
import signal
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from metaembed_jax.batch.items import Layout, Size
from metaembed_jax.batch.packing import pack
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.batch.training import DIGEST_WORDS, StepShape, TrainingBatch
from metaembed_jax.data.digests import digest_words
from metaembed_jax.data.mixture import Reference
from metaembed_jax.data.run_items import RunItems, StepItems, item_of
from metaembed_jax.data.workers import end_with_parent
from metaembed_jax.errors import UserError

AHEAD = 2  # batches that a thread makes before they are needed


def training_batches(
    items: RunItems, shape: StepShape, layout: Layout, here: Int[np.ndarray, " n"] | None = None
) -> grain.MapDataset:
    """Return the dataset whose element n is the `TrainingBatch` of step n, with the rows that this host makes.

    Args:
      items: items of the steps of the run.
      shape: shape of each batch.
      layout: the family's.
      here: the rows of each microbatch that this host makes; all by default.
    """
    here = np.arange(shape.size) if here is None else here
    return items.references.map_with_index(_BatchMaker(items, shape, layout, here))


def iterate(dataset: grain.MapDataset, start: int, stop: int, workers: int = 0) -> Generator[TrainingBatch, None, None]:
    """Yield batches start .. stop-1, made ahead of their use.

    Args:
      workers: processes that make them and hold two batches each; 0 for a thread of this process.

    Raises:
      UserError: a batch cannot be made, or a process was ended from outside.
    """
    chosen = dataset.slice(slice(start, stop))
    if workers:
        flags.FLAGS.mark_as_parsed()  # grain reads its own absl flags, which are not parsed here
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
            f"one of config.data.workers={workers} processes that make batches was ended from outside, most often for lack of "
            "memory; lower it, or free memory (in a container also /dev/shm, through which batches pass)"
        ) from error
    finally:
        batches.close()


def _start_worker(worker: int, workers: int) -> None:
    """End a worker process with its parent, and only then. Grain's workers outlive a parent that is killed, and keep its memory.

    SIGTERM of a scheduler and Ctrl-C reach all processes of a run, while the parent needs batches until the step after which it
    saves.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
    """Packs the items of a step, reads the records of this host's rows, and collates them."""

    items: RunItems
    shape: StepShape
    layout: Layout
    here: Int[np.ndarray, " n"]

    def __call__(self, step: int, references: list[Reference]) -> TrainingBatch:
        items = self.items.step_items(step, references)
        row, microbatches, size = self.shape
        slots_N2 = pack(items.sizes_N3, row)
        numbers = (np.arange(microbatches)[:, None] * size + self.here).ravel().tolist()
        rows, digests = self._rows(step, items, slots_N2[:, 0], numbers)
        batch = collate([rows[number] for number in numbers], row, self.layout, numbers)
        queries, documents, negative_mask = _vectors_of_pairs(items, slots_N2[:, 0], row.vectors)
        arrays: dict[str, Any] = {  # the fields of a batch name JAX's arrays
            "rows": batch.map(lambda x: x.reshape(microbatches, len(self.here), *x.shape[1:])),
            "queries": queries,
            "documents": documents,
            "negative_mask": negative_mask,
            "source": np.array([reference.source for reference in references], np.int32),
            "digests": digests.reshape(microbatches, len(self.here), *digests.shape[1:]),
            **self.items.candidate_numbers(references, step),
        }
        return TrainingBatch(**arrays)

    def _rows(
        self, step: int, items: StepItems, rows_N: Int[np.ndarray, "N"], numbers: list[int]
    ) -> tuple[dict[int, list[RowItem]], Int[np.ndarray, "n W V"]]:
        """Return the items of each row of `numbers`, in order, and their digests, each at its first vector."""
        records, rows = {}, {number: [] for number in numbers}
        digests = np.zeros((len(numbers), DIGEST_WORDS, self.shape.row.vectors), np.int32)
        index = {number: position for position, number in enumerate(numbers)}
        for item in np.flatnonzero(np.isin(rows_N, numbers)).tolist():
            pair, number = divmod(int(items.numbers_N[item]), items.items_per_pair)
            reference = items.references[pair]
            if pair not in records:
                records[pair] = self.items.read(reference, step)
            row_item = self.items.row_item(records[pair], number, reference)
            if row_item.size != (planned := Size(*items.sizes_N3[item].tolist())):
                raise UserError(
                    f"{self.items.item_name(reference, number)}: {row_item.size}; expected {planned}, by the sizes that are stored "
                    "with its source; prepare that again"
                )
            row = int(rows_N[item])
            first_vector = sum(earlier.read for earlier in rows[row])
            digests[index[row], :, first_vector] = digest_words(item_of(records[pair], number))
            rows[row].append(row_item)  # items of a row are ranked in item order
        return rows, digests


def _vectors_of_pairs(
    items: StepItems, rows_N: Int[np.ndarray, "N"], vectors: int
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "M"], Bool[np.ndarray, "B K"]]:
    """Return `queries`, `documents` and `negative_mask` of a `TrainingBatch` with rows of so many vectors."""
    order_N = np.argsort(rows_N, kind="stable")  # by row, then by rank in the row
    read_N, sorted_rows_N = items.sizes_N3[order_N, 2], rows_N[order_N]
    before_N = np.cumsum(read_N) - read_N
    before_N -= before_N[np.searchsorted(sorted_rows_N, sorted_rows_N)]  # vectors before the item in its row
    starts_BI = np.full((len(items.references), items.items_per_pair), -1, np.int32)
    starts_BI.ravel()[items.numbers_N[order_N]] = sorted_rows_N * vectors + before_N
    negatives_BK = starts_BI[:, 2:]
    mask_BK = negatives_BK >= 0
    negatives_BK = np.where(mask_BK, negatives_BK, starts_BI[:, 1:2])
    return starts_BI[:, 0].copy(), np.concatenate([starts_BI[:, 1], negatives_BK.ravel()]), mask_BK
