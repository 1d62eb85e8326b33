"""Queries and documents as arrays, and their sizes. Families add their prompts and images to this frame."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image
from tokenizers import Tokenizer

from metaembed_jax.batch.items import Example, Fitted, Limits
from metaembed_jax.errors import UserError
from metaembed_jax.files import digest
from metaembed_jax.inputs.images import image_size, open_image
from metaembed_jax.inputs.texts import QUERY, PromptTokenizer, read_item

ImageSize = tuple[int, int]  # (width, height)
LARGE = (10**5, 10**5)  # an image that every family makes as large as it can


class Grid(NamedTuple):
    """The grid by which a family cuts an image into patches.

    Attributes:
      rows, columns: numbers of units or tiles, as the family counts; their side is `Images.cell_size`.
      patches: number of patches, with padding.
      shrunk: the image was made smaller to fit.
    """

    rows: int
    columns: int
    patches: int
    shrunk: bool = False


class Prompt(NamedTuple):
    """A prompt around the user's text.

    Attributes:
      head: tokens before the text, including visual tokens.
      before, after: strings that are tokenized together with the text.
      tail: tokens after the text.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]


class PromptProcessor:
    """The base class of processors, which turn items into examples. Can be pickled, for worker processes.

    Args:
      tokenizer: the checkpoint's.
      images: how images become patches: the family's `Images`.
      limits: the largest item; None for any size.

    Raises:
      UserError: not even an empty text, or the smallest image, fits the limits.
    """

    title: ClassVar[str]  # of the family
    special_tokens: ClassVar[tuple[str, ...]]  # of its prompts
    filler: ClassVar[str]  # the special token that ends a query, ten times, before a line feed

    def __init__(self, tokenizer: Tokenizer, images: Any, limits: Limits | None = None):
        self.images, self.limits = images, limits
        self._tokenizer = PromptTokenizer(tokenizer, self.special_tokens, self.title)
        self._end_of_query = [self._tokenizer.ids[self.filler]] * 10 + self._tokenizer.encode("\n")
        self._check_limits()

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the family, the tokenizer, the processing of images and the limits."""
        return digest(repr([self.title, self.images, self.limits, self._tokenizer.to_str()]).encode())

    @property
    def page_pixels(self) -> int:
        """Pixels at which a page of a PDF file is drawn: those that are read of the largest square image in a row."""
        if self.limits is not None and not self.limits.patches:
            return 1  # an image is refused when its size is read
        grid, *_ = self._plan("", LARGE, "document", "page")
        assert grid is not None
        return grid.rows * grid.columns * self.images.cell_size**2

    def query(self, item: dict, *, name: str = "query") -> Example:
        """Convert an item of the query side: {"text": str, "image": PIL image or encoded bytes}, either or both.

        An image that does not fit the limits is shrunk; then the end of a text that does not fit is cut.

        Args:
          item: an empty text next to an image counts as absent. Special strings in a text are plain text.
          name: name of the item, for errors.

        Raises:
          UserError: nothing to encode, or an unreadable image.
        """
        return self._example(item, "query", name)

    def document(self, item: dict, *, name: str = "document") -> Example:
        """Convert an item of the document side; otherwise as `query`."""
        return self._example(item, "document", name)

    def size(self, item: dict, side: str, *, name: str = "item") -> Fitted:
        """Return the size of the example that `query` or `document` makes, without decoding an image.

        Args:
          item: its image may also be (width, height), upright.
          side: "query" or "document".

        Raises:
          UserError: as `query`, except for images that only decoding finds broken.
        """
        text, image = read_item(item, name)
        shape = None if image is None else image_size(image, name)
        grid, prompt, room = self._plan(text, shape, side, name)
        kept, cut = self._text_tokens(prompt, text, room, name)
        tokens = len(prompt.head) + len(kept) + len(prompt.tail)
        return Fitted(tokens, grid.patches if grid else 0, cut, bool(grid and grid.shrunk))

    def _check_limits(self) -> None:
        """Refuse limits that an empty text or the smallest image exceeds; rows without patches are for texts alone."""
        if self.limits is not None:
            for side in ("query", "document"):
                self.size({"text": ""}, side, name=side)
                if self.limits.patches:
                    self.size({"image": (1, 1)}, side, name=side)

    def _example(self, item: dict, side: str, name: str) -> Example:
        text, image = read_item(item, name)
        opened = None if image is None else open_image(image, name)
        grid, prompt, room = self._plan(text, None if opened is None else opened.size, side, name)
        kept, cut = self._text_tokens(prompt, text, room, name)
        tokens = np.array([*prompt.head, *kept, *prompt.tail], np.int32)
        arrays = {} if opened is None or grid is None else self._patches(opened, grid)
        mask = arrays.pop("patch_mask", np.ones(0 if grid is None else grid.patches, bool))
        return Example(
            tokens,
            self._positions(tokens, grid),
            self._visual(tokens, len(prompt.head), grid),
            arrays,
            mask,
            cut,
            bool(grid and grid.shrunk),
        )

    def _text_tokens(self, prompt: Prompt, text: str, room: int | None, name: str) -> tuple[list[int], int]:
        """Return the tokens of a text and the words around it, and the number of them that are cut."""
        tokens = self._tokenizer.fit(prompt.before, text, prompt.after, None, name)
        if room is None or len(tokens) <= room:
            return tokens, 0
        kept = self._tokenizer.fit(prompt.before, text, prompt.after, room, name)
        return kept, len(tokens) - len(kept)

    def _plan(self, text: str, shape: ImageSize | None, side: str, name: str) -> tuple[Grid | None, Prompt, int | None]:
        """Return an image's grid, the prompt, and the most tokens of the text with the words around it (None: any number)."""
        limits, with_image = self.limits, shape is not None
        if limits is None:
            grid = None if shape is None else self._grid(*shape, None, None, name)
            return grid, self._prompt(grid, side, bool(text), with_image), None
        bare = self._prompt(None, side, bool(text), with_image)
        words = len(self._tokenizer.encode(bare.before + bare.after))
        room = limits.prompt(side) - len(bare.head) - len(bare.tail) - words
        grid = None if shape is None else self._grid(*shape, room, limits.patches, name)
        prompt = self._prompt(grid, side, bool(text), with_image)
        room = limits.prompt(side) - len(prompt.head) - len(prompt.tail)
        if room < words:
            raise UserError(
                f"{name}: its prompt alone takes {limits.prompt(side) - room + words} tokens, and config.rows.size leaves "
                f"{limits.prompt(side)} for it; raise config.rows.size"
            )
        return grid, prompt, min(room, words + limits.text_tokens)

    def _prompt(self, grid: Grid | None, side: str, has_text: bool, with_image: bool) -> Prompt:
        """Return the prompt of an item, without visual tokens if the grid of its image is not known. Each family has its own."""
        raise NotImplementedError

    def _grid(self, width: int, height: int, most_tokens: int | None, most_patches: int | None, name: str) -> Grid:
        """Return the grid of an image, within so many tokens and patches (None: any number). Each family has its own."""
        raise NotImplementedError

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        """Return the arrays of `Layout.patches` of an RGB image, and `patch_mask` if it has padding. Each family has its own."""
        raise NotImplementedError

    def _visual(self, tokens: Int[np.ndarray, "S"], head: int, grid: Grid | None) -> Int[np.ndarray, "S"]:
        """Return the unit at each token, or -1; images are in the first `head` tokens. Each family has its own."""
        raise NotImplementedError

    def _positions(self, tokens: Int[np.ndarray, "S"], grid: Grid | None) -> Int[np.ndarray, "A S"]:
        """Return the positions of tokens: 0, 1, 2, ..., unless a family has others."""
        return np.arange(len(tokens), dtype=np.int32)[None]

    def _prefix(self, side: str) -> str:
        return QUERY if side == "query" else ""

    def _suffix(self, side: str) -> Sequence[int]:
        return self._end_of_query if side == "query" else ()


def no_room(name: str, most_tokens: int, most_patches: int, tokens: int, patches: int) -> UserError:
    """Return the error of an image that does not fit at its smallest size.

    Args:
      name: name of its item.
      most_tokens, most_patches: limits of the image.
      tokens, patches: size of the smallest image.
    """
    return UserError(
        f"{name}: config.rows.size leaves {most_tokens} tokens and {most_patches} patches for an image: expected at least {tokens} "
        f"and {patches}; raise config.rows.size"
    )
