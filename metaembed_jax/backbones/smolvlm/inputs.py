"""Inputs of SmolVLM: its prompts, with markers between the tiles of an image.

    text          <|im_start|>User: {prefix}{text}<end_of_utterance>
    image + text  <|im_start|>User:{tiles}{prefix}{text}<end_of_utterance>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, and empty for documents. Queries end with ten more <end_of_utterance> and "\\n". Meta Tokens are
not part of a prompt: they get their positions in a row. `tiles` of two rows and one column are, without the line breaks here,

    <fake_token_around_image><row_1_col_1><image>...<image>\\n
    <fake_token_around_image><row_2_col_1><image>...<image>\\n\\n
    <fake_token_around_image><global-img><image>...<image><fake_token_around_image>

and for an image of one tile, the last of these lines. A vocabulary without tokens for the markers spells them.
"""

import numpy as np
from jaxtyping import Int
from PIL import Image
from tokenizers import Tokenizer

from metaembed_jax.backbones.smolvlm.config import END, FRAME, IMAGE, PAD, START, TITLE
from metaembed_jax.backbones.smolvlm.images import MOST_TILES, Images, patchify
from metaembed_jax.batch.items import Limits
from metaembed_jax.inputs.processors import Grid, Prompt, PromptProcessor, no_room
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY

PAD_TOKEN = PAD
WHOLE = "<global-img>"
MARKERS = (WHOLE, *(f"<row_{row + 1}_col_{column + 1}>" for row in range(MOST_TILES) for column in range(MOST_TILES)))
NEEDED = (START, PAD, END, FRAME, IMAGE)
SPECIAL_TOKENS = (*NEEDED, *MARKERS)  # of a vocabulary made from scratch; a checkpoint's may lack the markers
PROMPT_WORDS = ("User: " + QUERY, IMAGE_ALONE)  # around the text of a prompt


class Processor(PromptProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title, special_tokens, filler = TITLE, NEEDED, END
    images: Images

    def __init__(self, tokenizer: Tokenizer, images: Images, limits: Limits | None = None):
        self._markers = {marker: tokenizer.token_to_id(marker) for marker in MARKERS}
        self._known_tiles: dict[tuple[int, int], list[int]] = {}  # tokens by rows and columns of tiles
        super().__init__(tokenizer, images, limits)

    def _prompt(self, grid: Grid | None, side: str, has_text: bool, with_image: bool) -> Prompt:
        ids, prefix = self._tokenizer.ids, self._prefix(side)
        head, tail = [ids[START]], [ids[END], *self._suffix(side)]
        if not with_image:
            return Prompt(head, f"User: {prefix}", "", tail)
        head += self._tokenizer.encode("User:")
        if grid:
            head += self._tiles(grid.rows, grid.columns)
        return Prompt(head, prefix if has_text else prefix + IMAGE_ALONE, "", tail)

    def _grid(self, width: int, height: int, most_tokens: int | None, most_patches: int | None, name: str) -> Grid:
        grids = self.images.grids(width, height)
        grid = next(grids)
        if most_tokens is None or most_patches is None:
            return grid
        while (tokens := len(self._tiles(grid.rows, grid.columns))) > most_tokens or grid.patches > most_patches:
            smaller = next(grids, None)
            if smaller is None:
                raise no_room(name, most_tokens, most_patches, tokens, grid.patches)
            grid = smaller
        return grid

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        return {"patches": patchify(image, grid, self.images)}

    def _visual(self, tokens: Int[np.ndarray, "S"], head: int, grid: Grid | None) -> Int[np.ndarray, "S"]:
        is_visual = tokens == self._tokenizer.ids[IMAGE]
        return np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)

    def _tiles(self, rows: int, columns: int) -> list[int]:
        """Return the tokens of an image."""
        if (rows, columns) not in self._known_tiles:
            tokens = []
            for row in range(rows if rows * columns > 1 else 0):
                for column in range(columns):
                    tokens += self._tile(f"<row_{row + 1}_col_{column + 1}>")
                tokens += self._tokenizer.encode("\n" if row + 1 < rows else "\n\n")
            self._known_tiles[rows, columns] = tokens + self._tile(WHOLE) + [self._tokenizer.ids[FRAME]]
        return self._known_tiles[rows, columns]

    def _tile(self, marker: str) -> list[int]:
        ids, number = self._tokenizer.ids, self._markers[marker]
        spelled = self._tokenizer.encode(marker) if number is None else [number]
        return [ids[FRAME], *spelled, *[ids[IMAGE]] * self.images.tile_units]
