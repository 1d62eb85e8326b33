"""Texts and images to what the network reads: the prompts of Qwen2.5-VL, M-RoPE positions, left-padded batches.

    text          <|im_start|>user\\n{prefix}{text}<|im_end|><|endoftext|>
    image + text  <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>{prefix}{text}<|im_end|><|endoftext|>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, which end with ten more <|endoftext|> and "\\n", and empty for candidates. Meta Tokens are no
part of it: the network appends them.

B batch, S tokens, P patches, X numbers in a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from metaembed_jax.data.images import ImageConfig, Patches, patchify
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import open_image
from metaembed_jax.inputs.texts import PromptTokenizer, read_item

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
IMAGE_ALONE = "Describe the image."
PATCH_DIM = 3 * 14 * 14


class Example(NamedTuple):
    """One item, without padding.

    Attributes:
      tokens: rows of the vocabulary.
      positions: M-RoPE positions (time, height, width), from 0.
      visual_index: of image tokens, the slot of their unit in window order (`Patches.raster`); -1 elsewhere.
      patches: the image, if there is one.
    """

    tokens: Int[np.ndarray, "S"]
    positions: Int[np.ndarray, "3 S"]
    visual_index: Int[np.ndarray, "S"]
    patches: Patches | None


BLANK = Example(np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.full(1, -1, np.int32), None)  # in rows that no item takes


class ShapeClass(NamedTuple):
    """The padded size of an item: tokens, and patches (0: no image; else a multiple of a window's)."""

    tokens: int
    patches: int


class Processor:
    """Turns items into examples with a checkpoint's tokenizer. Survives pickling, for worker processes."""

    def __init__(self, tokenizer: Tokenizer, image_config: ImageConfig):
        self.image_config = image_config
        self._tokenizer = PromptTokenizer(tokenizer, SPECIAL_TOKENS, "Qwen2.5-VL")
        self._newline = self._tokenizer.encode("\n")

    def query(self, item: dict, *, max_tokens: int | None = None, name: str = "query") -> Example:
        """An item of the query side: {"text": str, "image": PIL image or encoded bytes}, either or both.

        Args:
          item: text that is empty beside an image counts as absent. Special strings in it are plain text.
          max_tokens: what is longer loses the end of the user's text, never prompt or image tokens.
          name: of the item, for errors.

        Raises:
          UserError: nothing to encode, an unreadable image, or no room for prompt and image.
        """
        suffix = [self._tokenizer.ids["<|endoftext|>"]] * 10 + self._newline
        return self._example(item, "Query: ", suffix, max_tokens, name)

    def candidate(self, item: dict, *, max_tokens: int | None = None, name: str = "candidate") -> Example:
        """An item of the candidate side; otherwise as `query`."""
        return self._example(item, "", [], max_tokens, name)

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        text, image = read_item(item, name)
        ids = self._tokenizer.ids
        patches = None if image is None else patchify(open_image(image, name), self.image_config, name)
        if patches is None:
            head, prompt, visual = [ids["<|im_start|>"]], f"user\n{prefix}", slice(0, 0)
        else:
            head = [ids["<|im_start|>"], *self._tokenizer.encode("user\n"), ids["<|vision_start|>"]]
            visual = slice(len(head), len(head) + len(patches.raster))
            head += [ids["<|image_pad|>"]] * len(patches.raster) + [ids["<|vision_end|>"]]
            prompt = prefix if text else prefix + IMAGE_ALONE
        tail = [ids["<|im_end|>"], ids["<|endoftext|>"], *suffix]

        room = None if max_tokens is None else max_tokens - len(head) - len(tail)
        tokens = np.array(head + self._tokenizer.fit(prompt, text, "", room, name) + tail, np.int32)
        visual_index = np.full(len(tokens), -1, np.int32)
        if patches is not None:
            visual_index[visual] = patches.raster
        return Example(tokens, rope_positions(len(tokens), visual.start, patches), visual_index, patches)


def collate(examples: Sequence[Example], shape: ShapeClass, patch_dim: int = PATCH_DIM) -> dict[str, np.ndarray]:
    """Examples as rows of one batch, tokens padded on the left, patches at the end.

    Returns:
      tokens [B, S] int32, positions [B, 3, S] int32, mask [B, S] bool, visual_index [B, S] int32 (-1 in padding), and, where
      the shape has patches, patches [B, P, X] uint8, patch_positions [B, P, 2] int32, patch_mask [B, P] bool.

    Raises:
      UserError: an example does not fit the shape.
    """
    B, S, P = len(examples), *shape
    batch = {
        "tokens": np.zeros((B, S), np.int32),
        "positions": np.zeros((B, 3, S), np.int32),
        "mask": np.zeros((B, S), bool),
        "visual_index": np.full((B, S), -1, np.int32),
    }
    if P:
        batch["patches"] = np.zeros((B, P, patch_dim), np.uint8)
        batch["patch_positions"] = np.zeros((B, P, 2), np.int32)
        batch["patch_mask"] = np.zeros((B, P), bool)
    for row, example in enumerate(examples):
        n, p = len(example.tokens), 0 if example.patches is None else len(example.patches.mask)
        if n > S or p > P:
            sizes = f"{n} tokens and {p} patches; its shape class holds {S} and {P}"
            raise UserError(f"row {row} of the batch has {sizes}: enlarge the class or lower max_pixels")
        batch["tokens"][row, S - n :] = example.tokens
        batch["positions"][row, :, S - n :] = example.positions
        batch["mask"][row, S - n :] = True
        batch["visual_index"][row, S - n :] = example.visual_index
        if p:
            batch["patches"][row, :p] = example.patches.patches
            batch["patch_positions"][row, :p] = example.patches.positions
            batch["patch_mask"][row, :p] = example.patches.mask
    return batch


def rope_positions(length: int, start: int, patches: Patches | None) -> Int[np.ndarray, "3 S"]:
    """M-RoPE: text counts on alike on three axes; an image from `start` holds time, and spans its rows and columns.

    After the image, text goes on past its larger side. The values of transformers' `Qwen2_5_VLModel.get_rope_index`.
    """
    if patches is None:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    rows, columns = patches.grid
    before, after = np.arange(start), np.arange(length - start - rows * columns) + start + max(rows, columns)
    image = np.stack([np.zeros(rows * columns, int), *np.indices((rows, columns)).reshape(2, -1)]) + start
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(after, (3, 1))], axis=1).astype(np.int32)
