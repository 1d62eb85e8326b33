"""Rows of the steps of a mixture, for items of typical sizes.

N items of a step, pair by pair: a query, its document and its hard negatives.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers

from metaembed_jax.backbones.family import family
from metaembed_jax.batch.items import Limits, Size
from metaembed_jax.batch.packing import Fill, fill, pack, row_vectors
from metaembed_jax.config.run import RunConfig
from metaembed_jax.data.source_schedule import balanced_schedule
from metaembed_jax.network import SIDES
from metaembed_jax.network_config import model_config, row_limits, run_vectors
from metaembed_jax.planning.typical_items import typical_document, typical_pair

STEPS = 8  # that are packed
UNKNOWN_WORD = "word"


class RowsOfSteps(NamedTuple):
    """Rows of a run's steps.

    Attributes:
      mean, largest: average and largest number of rows of a step.
      fill: average fill of the rows.
      vectors: the most vectors in a row.
    """

    mean: float
    largest: int
    fill: Fill
    vectors: int


def typical_steps(config: RunConfig, size: Callable[[dict, str], Size], steps: int) -> Iterator[Int[np.ndarray, "_ 3"]]:
    """Yield the sizes of the items of each step of a config's mixture; items are drawn from `typical_items`.

    Args:
      size: `(item, side) -> Size`; a side is "query" or "document".
    """
    names, weights, _ = zip(*config.data.sources, strict=True)
    sub_batch = config.data.sub_batch or config.rows.batch_size
    rng = np.random.default_rng(config.seed)

    def pairs(name: str, count: int) -> np.ndarray:
        """Draw pairs, and return their sizes, [count, 2 + negatives, 3]."""
        items = [
            (*typical_pair(name, rng), *(typical_document(name, rng) for _ in range(config.data.negatives))) for _ in range(count)
        ]
        return np.array([[size(query, "query"), *(size(document, "document") for document in rest)] for query, *rest in items])

    means_S2 = np.array([pairs(name, 100).sum(axis=1).mean(axis=0)[:2].astype(int) for name in names])
    for sources in balanced_schedule(weights, means_S2, config.rows.batch_size // sub_batch, steps).tolist():
        yield np.concatenate([pairs(names[source], sub_batch) for source in sources]).reshape(-1, 3)


def typical_rows(config: RunConfig) -> tuple[Size, RowsOfSteps]:
    """Return the capacity of a config's row, and the rows of some steps of its mixture with items of typical sizes.

    Raises:
      UserError: `config.rows.size` does not fit the network.
    """
    limits = row_limits(config)
    steps = list(typical_steps(config, _item_size(config, limits), min(config.schedule.steps, STEPS)))
    vectors = limits.tokens  # if all states are read
    if (of_items := run_vectors(config).vectors) is not None:
        vectors = row_vectors(steps, limits.tokens, limits.patches, sum(of_items))
    row = Size(limits.tokens, limits.patches, vectors)
    return row, rows_of_steps(steps, row)


def _item_size(config: RunConfig, limits: Limits) -> Callable[[dict, str], Size]:
    """Return `(item, side) -> Size` for the family's prompts and images, with one token for each word."""
    backbone, (meta, vectors) = family(config.model.backbone), run_vectors(config)
    words = Tokenizer(models.WordLevel({UNKNOWN_WORD: 0}, unk_token=UNKNOWN_WORD))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(backbone.Processor.special_tokens))
    images = backbone.Images.from_run(config.data, model_config(config).architecture, None)
    processor = backbone.Processor(words, images, limits)

    def size(item: dict, side: str) -> Size:
        fitted, side_index = processor.size(item, side), SIDES.index(side)
        return Size(fitted.tokens + meta[side_index], fitted.patches, vectors[side_index] if vectors else fitted.tokens)

    return size


def rows_of_steps(steps: Sequence[Int[np.ndarray, "_ 3"]], row: Size) -> RowsOfSteps:
    """Pack each step into rows of one capacity.

    Raises:
      UserError: an item is larger than a row.
    """
    packed = [pack(sizes_N3, row)[:, 0] for sizes_N3 in steps]
    rows = [int(rows_N.max()) + 1 for rows_N in packed]
    vectors = max(np.bincount(rows_N, sizes_N3[:, 2]).max() for rows_N, sizes_N3 in zip(packed, steps, strict=True))
    return RowsOfSteps(float(np.mean(rows)), max(rows), fill(np.concatenate(steps), row, sum(rows)), int(vectors))
