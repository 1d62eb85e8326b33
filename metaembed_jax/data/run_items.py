"""The items of each step of a run, and their sizes, before any record is read.

B pairs, K negatives a pair, C = 1 + K candidates, I = 2 + K items of a pair, N items of a step: pair by pair, without negatives
that a pair lacks.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from metaembed_jax.batch.rows import RowItem
from metaembed_jax.batch.training import StepShape
from metaembed_jax.config.run import RunConfig
from metaembed_jax.data.mixture import Reference, check_mixture, mixture
from metaembed_jax.data.sizes import CUT, PATCHES, SHRUNK, TOKENS, SourceSizes
from metaembed_jax.data.sources.candidates import NUMBERS, as_arrays
from metaembed_jax.data.sources.descriptions import describe_row, read_row
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.network_config import run_vectors

SAMPLED_PAIRS = 64  # of a source, for the mean size of its pairs


class StepItems(NamedTuple):
    """The items of a step.

    Attributes:
      references: references to the pairs.
      items_per_pair: I.
      numbers_N: pair * I + number in the pair: 0 is the query, 1 the positive, then negatives.
      sizes_N3: tokens (Meta Tokens included), patches, vectors.
      is_cut_N: the text is cut.
      is_shrunk_N: the image is smaller than its family would make it.
    """

    references: list[Reference]
    items_per_pair: int
    numbers_N: Int[np.ndarray, "N"]
    sizes_N3: Int[np.ndarray, "N 3"]
    is_cut_N: Bool[np.ndarray, "N"]
    is_shrunk_N: Bool[np.ndarray, "N"]

    def figures(self, shape: StepShape) -> dict[str, float]:
        """Return figures of the step's rows, for its metrics."""
        tokens, patches, _ = self.sizes_N3.sum(axis=0).tolist()
        fill = {"fill/tokens": tokens / (shape.rows * shape.row.tokens)}
        if shape.row.patches:
            fill["fill/patches"] = patches / (shape.rows * shape.row.patches)
        images = int((self.sizes_N3[:, 1] > 0).sum())
        return fill | {"cut": float(self.is_cut_N.mean()), "shrunk": int(self.is_shrunk_N.sum()) / max(images, 1)}


@dataclasses.dataclass(frozen=True)
class RunItems:
    """The items of each step of a run. Can be pickled, for worker processes.

    Attributes:
      references: those of each step, from `mixture`.
      sources, names, sizes: one of each for every source of `config.data.sources`.
      processor: the family's, with the limits of the run.
      negatives: K, the most that are used of a pair.
      numbers: those of `candidates.NUMBERS` that a source has and a loss reads.
      meta: Meta Tokens after a query, and after a document.
      vectors: number of vectors of a query, and of a document; None: one of each token.
    """

    references: grain.MapDataset
    sources: tuple[Sequence, ...]
    names: tuple[str, ...]
    sizes: tuple[SourceSizes, ...]
    processor: PromptProcessor
    negatives: int
    numbers: tuple[str, ...]
    meta: tuple[int, int]
    vectors: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, step: int) -> StepItems:
        return self.step_items(step, self.references[step])  # pyright: ignore[reportArgumentType] (only a filter makes None)

    def step_items(self, step: int, references: list[Reference]) -> StepItems:
        """Return the items of the pairs of a step."""
        items_per_pair, sizes_N4 = 2 + self.negatives, self._sizes(step, references).reshape(-1, 4)
        numbers_N = np.flatnonzero(sizes_N4[:, TOKENS])
        sizes_N4, is_document_N = sizes_N4[numbers_N], (numbers_N % items_per_pair > 0).astype(int)
        tokens_N = sizes_N4[:, TOKENS] + np.array(self.meta)[is_document_N]
        vectors_N = tokens_N if self.vectors is None else np.array(self.vectors)[is_document_N]
        sizes_N3 = np.stack([tokens_N, sizes_N4[:, PATCHES], vectors_N], axis=1)
        return StepItems(references, items_per_pair, numbers_N, sizes_N3, sizes_N4[:, CUT] > 0, sizes_N4[:, SHRUNK] > 0)

    def _sizes(self, step: int, references: list[Reference]) -> Int[np.ndarray, "B I 4"]:
        """Return the sizes of the items of pairs; those of a source with a table are gathered at once."""
        sources_B, _, rows_B = np.array(references).T
        sizes_BI4 = np.zeros((len(references), 2 + self.negatives, 4), np.int32)
        for source in np.unique(sources_B).tolist():
            pairs = np.flatnonzero(sources_B == source)
            sizes = self.sizes[source]
            if sizes.table is None:
                sizes_BI4[pairs] = [sizes.of(references[pair].row, references[pair].epoch, step) for pair in pairs.tolist()]
            else:
                sizes_BI4[pairs] = sizes.table[rows_B[pairs]]
        return sizes_BI4

    def read(self, reference: Reference, step: int) -> dict:
        """Read or compose the record of a pair."""
        return read_row(self.sources[reference.source], reference.row, reference.epoch, step)

    def candidate_numbers(self, references: list[Reference], step: int) -> dict[str, Float[np.ndarray, "B C"]]:
        """Return the teacher scores and labels of the candidates of pairs, if a source of the run has any.

        Every host has those of all pairs: they are read from descriptions, which hold no image.
        """
        if not self.numbers:
            return {}
        descriptions = [self._describe(reference, step) for reference in references]
        return {name: array for name, array in as_arrays(descriptions, self.negatives).items() if name in self.numbers}

    def _describe(self, reference: Reference, step: int) -> dict:
        source, epoch, row = reference
        if not _numbers(self.sources[source]):
            return {}
        return describe_row(self.sources[source], row, epoch, step, self.names[source])

    def row_item(self, record: dict, number: int, reference: Reference) -> RowItem:
        """Return an item of a record, by its number in the pair."""
        name, item, side = self.item_name(reference, number), item_of(record, number), min(number, 1)
        make = (self.processor.query, self.processor.document)[side]
        return RowItem(make(item, name=name), self.meta[side], None if self.vectors is None else self.vectors[side])

    def item_name(self, reference: Reference, number: int) -> str:
        """Return the name of an item for errors."""
        item = ("query", "positive")[number] if number < 2 else f"negative {number - 2}"
        return f"source {self.names[reference.source]!r}, row {reference.row}, {item}"


def item_of(record: dict, number: int) -> dict:
    """Return an item of a record, by its number in the pair: 0 is the query, 1 the positive, then negatives."""
    return record[("query", "positive")[number]] if number < 2 else record["negatives"][number - 2]


def run_items(config: RunConfig, processor: PromptProcessor, sources: Sequence[Sequence]) -> RunItems:
    """Return the items of a run's steps, at the largest budgets that it trains.

    Args:
      processor: the family's, with `row_limits`.
      sources: one for each entry of `config.data.sources`, in its order.

    Raises:
      UserError: as `check_mixture`; or an item does not fit a row.
    """
    check_mixture(config.data, config.rows.batch_size, sources)
    names, negatives = tuple(name for name, *_ in config.data.sources), config.data.negatives
    sizes = tuple(SourceSizes(source, processor, negatives, name) for name, source in zip(names, sources, strict=True))
    means_S2 = np.array([_mean_pair(size, len(source)) for size, source in zip(sizes, sources, strict=True)])
    references = mixture(config, sources, means_S2)
    numbers = _used_numbers(config, sources)
    return RunItems(references, tuple(sources), names, sizes, processor, negatives, numbers, *run_vectors(config))


def _used_numbers(config: RunConfig, sources: Sequence[Sequence]) -> tuple[str, ...]:
    """Return those of `candidates.NUMBERS` that a source of a run has and its losses read.

    Raises:
      UserError: a loss reads the scores of a teacher, and no source has any.
    """
    negatives, reads_scores = config.data.negatives, config.objectives.reads_teacher_scores
    present = [name for name in NUMBERS if negatives and any(name in _numbers(source) for source in sources)]
    if reads_scores and "teacher_scores" not in present:
        names = ", ".join(name for name, *_ in config.data.sources)
        raise UserError(
            "config.objectives.matryoshka.teacher_weight is above 0, and "
            + (
                f"no pair of {names} has teacher_scores; set it to 0"
                if negatives
                else "config.data.negatives is 0; set both, or none"
            )
        )
    return tuple(name for name in present if name != "teacher_scores" or reads_scores)


def _numbers(source: Sequence) -> list[str]:
    """Return those of `candidates.NUMBERS` that some record of a source has."""
    stored = getattr(source, "stored", None)
    return [name for name in NUMBERS if stored is not None and stored.marker.get(name)]


def _mean_pair(sizes: SourceSizes, pairs: int) -> Int[np.ndarray, "2"]:
    """Return the mean tokens and patches of a source's pairs, without Meta Tokens."""
    rows = np.linspace(0, pairs - 1, min(pairs, SAMPLED_PAIRS)).astype(int).tolist()
    return np.stack([sizes.of(row, 0, 0) for row in rows]).sum(axis=(0, 1))[[TOKENS, PATCHES]] // len(rows)
