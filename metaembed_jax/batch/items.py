"""Arrays of a query or document, before it has a row.

S tokens, A axes of positions, P patches (squares of an image, as the family counts them).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Size(NamedTuple):
    """The size of an item, or the capacity of a row.

    Attributes:
      tokens: positions of the language model, visual tokens and Meta Tokens included.
      patches: positions of the vision tower, its padding included.
      vectors: Meta Tokens that are read out.
    """

    tokens: int
    patches: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.patches} patches, {self.vectors} vectors"


class ArraySpec(NamedTuple):
    """An array of patches.

    Attributes:
      shape: shape of a patch.
      dtype: NumPy's name.
      fill: the value of padding.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: int = 0


class Layout(NamedTuple):
    """The arrays of batches that differ between families.

    Attributes:
      patches: arrays [P, *shape] of an item, by name; "patches", the pixels in uint8, is one of them.
      position_axes: A, 3 for M-RoPE, else 1.
      unit: patches that become one visual token.
      multiple: the number of patches of every image, padding included, is a multiple of it.
    """

    patches: dict[str, ArraySpec]
    position_axes: int
    unit: int
    multiple: int


class Limits(NamedTuple):
    """The largest item of a row. A larger image is shrunk, a longer text is cut.

    Attributes:
      tokens: tokens of a row.
      patches: patches of a row.
      text_tokens: tokens of the user's text in an item.
      query_tokens, document_tokens: tokens of a row that a prompt of each side leaves free, for its Meta Tokens.
    """

    tokens: int
    patches: int
    text_tokens: int
    query_tokens: int
    document_tokens: int

    def prompt(self, side: str) -> int:
        """Return the most tokens of a prompt of "query" or "document"."""
        return self.tokens - {"query": self.query_tokens, "document": self.document_tokens}[side]


class Fitted(NamedTuple):
    """The size of an item that fits its limits.

    Attributes:
      tokens: tokens of the prompt, without Meta Tokens.
      patches: patches of the image with its padding; 0 without an image.
      cut: tokens of the user's text that were cut off.
      shrunk: the image was made smaller than its family would make it.
    """

    tokens: int
    patches: int
    cut: int = 0
    shrunk: bool = False


class Example(NamedTuple):
    """A prompt as arrays; Meta Tokens are appended when it gets its row.

    Attributes:
      tokens: rows of the vocabulary.
      positions: from 0, on each axis; those of Meta Tokens continue after the largest.
      visual: the visual token (unit) of the image at each token, -1 elsewhere.
      patch_arrays: [P, *shape], by the names of `Layout.patches`; {} without an image.
      patch_mask: false for padding among the patches; empty without an image.
      cut, shrunk: as in `Fitted`.
    """

    tokens: Int[np.ndarray, "S"]
    positions: Int[np.ndarray, "A S"]
    visual: Int[np.ndarray, "S"]
    patch_arrays: dict[str, np.ndarray]
    patch_mask: Bool[np.ndarray, "P"]
    cut: int = 0
    shrunk: bool = False

    @property
    def patches(self) -> int:
        """P; 0 without an image."""
        return len(self.patch_mask)
