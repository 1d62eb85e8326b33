"""The rows of a run, planned from the sizes of all its items before its first step."""

import dataclasses

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from metaembed_jax.batch.items import Limits, Size
from metaembed_jax.batch.packing import best_fit_rows, pack, row_vectors
from metaembed_jax.batch.training import StepShape, step_shape
from metaembed_jax.data.run_items import RunItems

VECTOR_STEPS = 4  # the first steps, from which the vectors of a row are estimated
CHUNK_STEPS = 64  # steps that are packed together


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """The rows of a run, known before its first step.

    Attributes:
      row: the capacity of a row.
      rows: rows of a step, the fewest that suffice for every step.
      tokens, patches: the mean use of a step's items.
      longest: tokens of the longest item, its Meta Tokens included.
      cut, shrunk: the share of items whose text is cut, and of images that are shrunk.
    """

    row: Size
    rows: int
    tokens: float
    patches: float
    longest: int
    cut: float
    shrunk: float

    def shape(self, most: int, shards: int) -> StepShape:
        """Return the shape of each batch; see `step_shape`."""
        return step_shape(self.row, self.rows, most, shards)

    def figures(self, shape: StepShape) -> dict[str, float]:
        """Return the plan as figures, for metrics."""
        figures = {
            "rows": shape.rows,
            "rows/tokens": self.row.tokens,
            "rows/patches": self.row.patches,
            "rows/vectors": self.row.vectors,
            "rows/fill/tokens": self.tokens / (shape.rows * self.row.tokens),
            "rows/longest": self.longest,
            "rows/cut": self.cut,
            "rows/shrunk": self.shrunk,
        }
        if self.row.patches:
            figures["rows/fill/patches"] = self.patches / (shape.rows * self.row.patches)
        return figures

    def describe(self, shape: StepShape) -> str:
        """Return the plan in one line, for the user."""
        figures = self.figures(shape)
        size, fill = f"{self.row.tokens} tokens", f"{100 * figures['rows/fill/tokens']:.0f} % of tokens"
        if self.row.patches:
            size += f" and {self.row.patches} patches"
            fill += f" and {100 * figures['rows/fill/patches']:.0f} % of patches"
        microbatches = f" in {shape.microbatches} microbatches" if shape.microbatches > 1 else ""
        return (
            f"rows: {shape.rows} of {size} a step{microbatches}, {fill} used; the longest item takes {self.longest} tokens; "
            f"{100 * self.cut:.3g} % of texts are cut, {100 * self.shrunk:.3g} % of images shrunk"
        )


def plan_rows(items: RunItems, limits: Limits, silent: bool = True) -> RowPlan:
    """Plan the rows of all steps.

    Args:
      limits: `row_limits` of the run.
      silent: show no progress bar.
    """
    steps = len(items)
    sampled = [items[step].sizes_N3 for step in range(min(steps, VECTOR_STEPS))]
    vectors = limits.tokens  # if all states are read
    if items.vectors is not None:
        vectors = row_vectors(sampled, limits.tokens, limits.patches, sum(items.vectors))
    row, rows, longest, used_3, counts_4 = Size(limits.tokens, limits.patches, vectors), 0, 0, np.zeros(3, int), np.zeros(4, int)
    with tqdm(total=steps, desc="planning rows", unit="step", delay=2, mininterval=0.5, disable=silent) as bar:
        for first in range(0, steps, CHUNK_STEPS):
            chunk = [items[step] for step in range(first, min(first + CHUNK_STEPS, steps))]
            rows = _most_rows([step.sizes_N3 for step in chunk], row, rows)
            for step in chunk:
                longest = max(longest, int(step.sizes_N3[:, 0].max()))
                used_3 += step.sizes_N3.sum(axis=0)
                counts_4 += [step.is_cut_N.sum(), len(step.is_cut_N), step.is_shrunk_N.sum(), (step.sizes_N3[:, 1] > 0).sum()]
            bar.update(len(chunk))
    tokens, patches, _ = (used_3 / steps).tolist()
    cut, texts, shrunk, images = counts_4.tolist()
    row = row if images else row._replace(patches=0)
    return RowPlan(row, rows, tokens, patches, longest, cut / texts, shrunk / max(images, 1))


def _most_rows(steps: list[Int[np.ndarray, "_ 3"]], row: Size, rows: int) -> int:
    """Return the larger of `rows` and the rows that any of some steps needs. Only steps that could need more are packed."""
    bounds_S = best_fit_rows(steps, row)
    for step in np.argsort(-bounds_S, kind="stable").tolist():
        if bounds_S[step] <= rows:
            break
        rows = max(rows, int(pack(steps[step], row)[:, 0].max()) + 1)
    return rows
