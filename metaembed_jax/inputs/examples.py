"""Items as arrays, and their rows of a batch: tokens padded on the left, patches at the end.

A family's `Layout` names the arrays that its network reads beside `tokens` and `mask`, and says how they are padded.

B rows, S tokens, P patches (what a family counts as one: a square of an image, or a tile).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from metaembed_jax.errors import UserError


class ShapeClass(NamedTuple):
    """The padded size of an item: tokens, and patches (0: no image; else a multiple of the family's `Config.patch_multiple`)."""

    tokens: int
    patches: int


class ArraySpec(NamedTuple):
    """An array of a batch.

    Attributes:
      shape: of one token's or patch's part.
      dtype: NumPy's name.
      fill: what padding holds.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: int = 0


class Layout(NamedTuple):
    """The arrays of a family's batches, beside `tokens` [B, S] int32 and `mask` [B, S] bool.

    Attributes:
      tokens: arrays [B, *shape, S], by name.
      patches: arrays [B, P, *shape], by name; a batch of a class without patches lacks them. One is `patch_mask`, bool: true where
        there is something of an image.
    """

    tokens: dict[str, ArraySpec]
    patches: dict[str, ArraySpec]


class Example(NamedTuple):
    """One item, without padding to a class.

    Attributes:
      tokens: rows of the vocabulary.
      token_arrays: [*shape, S], by the names of `Layout.tokens`.
      patch_arrays: [P, *shape], by the names of `Layout.patches`; {} without an image.
    """

    tokens: Int[np.ndarray, "S"]
    token_arrays: dict[str, np.ndarray]
    patch_arrays: dict[str, np.ndarray]

    @property
    def patches(self) -> int:
        """P; 0 without an image."""
        return len(next(iter(self.patch_arrays.values()), ()))


def blank(layout: Layout) -> Example:
    """What stands in rows that no item takes: one token, no image."""
    arrays = {name: np.full((*spec.shape, 1), spec.fill, spec.dtype) for name, spec in layout.tokens.items()}
    return Example(np.zeros(1, np.int32), arrays, {})


def collate(examples: Sequence[Example], shape: ShapeClass, layout: Layout) -> dict[str, np.ndarray]:
    """Examples as rows of one batch of a shape class.

    Returns:
      tokens [B, S] int32 (0 in padding), mask [B, S] bool, and the arrays of the layout; those of patches where the class has any.

    Raises:
      UserError: an example does not fit the class.
    """
    B, S, P = len(examples), *shape
    batch = {"tokens": np.zeros((B, S), np.int32), "mask": np.zeros((B, S), bool)}
    batch |= {name: np.full((B, *spec.shape, S), spec.fill, spec.dtype) for name, spec in layout.tokens.items()}
    if P:
        batch |= {name: np.full((B, P, *spec.shape), spec.fill, spec.dtype) for name, spec in layout.patches.items()}
    for row, example in enumerate(examples):
        n, p = len(example.tokens), example.patches
        if n > S or p > P:
            sizes = f"{n} tokens and {p} patches; its shape class holds {S} and {P}"
            raise UserError(f"row {row} of the batch has {sizes}: enlarge the class, or lower max_pixels (some families ignore it)")
        batch["tokens"][row, S - n :] = example.tokens
        batch["mask"][row, S - n :] = True
        for name, array in example.token_arrays.items():
            batch[name][row, ..., S - n :] = array
        for name, array in example.patch_arrays.items():
            batch[name][row, :p] = array
    return batch
