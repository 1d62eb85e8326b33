"""Inputs of the Qwen-VL families: prompts, M-RoPE positions, and the positions of visual tokens.

    text          <|im_start|>user\\n{prefix}{text}<|im_end|><|endoftext|>
    image + text  <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>{prefix}{text}<|im_end|><|endoftext|>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, and empty for documents. Queries end with ten more <|endoftext|> and "\\n". Meta Tokens are not
part of a prompt: they get their positions in a row.

S tokens.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from metaembed_jax.inputs.processors import Grid, Prompt, PromptProcessor
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PAD_TOKEN = "<|endoftext|>"
PROMPT_WORDS = ("user\n", QUERY, IMAGE_ALONE)  # around the text of a prompt


class Processor(PromptProcessor):
    """Base class of the families' processors, which define `title` and `_patches`."""

    images: Any  # the family's `Images`
    special_tokens, filler = SPECIAL_TOKENS, "<|endoftext|>"

    def _prompt(self, grid: Grid | None, side: str, has_text: bool, with_image: bool) -> Prompt:
        ids, prefix = self._tokenizer.ids, self._prefix(side)
        tail = [ids["<|im_end|>"], ids["<|endoftext|>"], *self._suffix(side)]
        if not with_image:
            return Prompt([ids["<|im_start|>"]], f"user\n{prefix}", "", tail)
        visual = [ids["<|image_pad|>"]] * (grid.rows * grid.columns if grid else 0)
        user = [ids["<|im_start|>"], *self._tokenizer.encode("user\n")]
        head = [*user, ids["<|vision_start|>"], *visual, ids["<|vision_end|>"]]
        return Prompt(head, prefix if has_text else prefix + IMAGE_ALONE, "", tail)

    def _grid(self, width: int, height: int, most_tokens: int | None, most_patches: int | None, name: str) -> Grid:
        return self.images.grid(width, height, most_tokens, most_patches, name)

    def _visual(self, tokens: Int[np.ndarray, "S"], head: int, grid: Grid | None) -> Int[np.ndarray, "S"]:
        visual = np.full(len(tokens), -1, np.int32)
        if grid is not None:
            visual[:head][tokens[:head] == self._tokenizer.ids["<|image_pad|>"]] = self._order(grid)
        return visual

    def _order(self, grid: Grid) -> Int[np.ndarray, "U"]:
        """Return the index of each unit of an image, given in raster order, among its units: by default also in raster order."""
        return np.arange(grid.rows * grid.columns, dtype=np.int32)

    def _positions(self, tokens: Int[np.ndarray, "S"], grid: Grid | None) -> Int[np.ndarray, "3 S"]:
        if grid is None:
            return rope_positions(len(tokens), 0, None)
        start = int(np.argmax(tokens == self._tokenizer.ids["<|image_pad|>"]))
        return rope_positions(len(tokens), start, (grid.rows, grid.columns))


def rope_positions(length: int, start: int, grid: tuple[int, int] | None) -> Int[np.ndarray, "3 S"]:
    """Return M-RoPE positions. Text has the same position on all three axes; an image at `start` has one time, rows and columns.

    After the image, text continues past its larger side. The values are those of `get_rope_index` of transformers' models.
    """
    if grid is None:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    rows, columns = grid
    before, after = np.arange(start), np.arange(length - start - rows * columns) + start + max(rows, columns)
    image = np.stack([np.zeros(rows * columns, int), *np.indices((rows, columns)).reshape(2, -1)]) + start
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(after, (3, 1))], axis=1).astype(np.int32)
