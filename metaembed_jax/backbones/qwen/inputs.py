"""Texts and images to what the network reads: the prompts of Qwen-VL, M-RoPE positions, places of visual tokens.

    text          <|im_start|>user\\n{prefix}{text}<|im_end|><|endoftext|>
    image + text  <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>{prefix}{text}<|im_end|><|endoftext|>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, which end with ten more <|endoftext|> and "\\n", and empty for candidates. Meta Tokens are no
part of it: the network appends them.

S tokens. An example's arrays, beside its tokens:

    positions [3, S]          M-RoPE positions (time, height, width), from 0
    visual_index [S]          of image tokens, the slot of their unit (`Patches.raster`); -1 elsewhere
    patches, patch_positions, patch_mask
                              see `Patches`
"""

import numpy as np
from jaxtyping import Int

from metaembed_jax.backbones.qwen.images import patchify
from metaembed_jax.inputs.examples import Example
from metaembed_jax.inputs.images import open_image
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY, read_item

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PAD_TOKEN = "<|endoftext|>"
PROMPT_WORDS = ("user\n", QUERY, IMAGE_ALONE)  # what the prompts say around every text


class Processor(PromptProcessor):
    """A base for the families' own, which have a `title`."""

    special_tokens, filler = SPECIAL_TOKENS, "<|endoftext|>"

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        text, image = read_item(item, name)
        ids = self._tokenizer.ids
        patches = None if image is None else patchify(open_image(image, name), self.images, name)
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
        positions = rope_positions(len(tokens), visual.start, None if patches is None else patches.grid)
        arrays = {} if patches is None else patches.arrays
        return Example(tokens, {"positions": positions, "visual_index": visual_index}, arrays)


def rope_positions(length: int, start: int, grid: tuple[int, int] | None) -> Int[np.ndarray, "3 S"]:
    """M-RoPE: text counts on alike on three axes; an image from `start` holds time, and spans its rows and columns.

    After the image, text goes on past its larger side. The values of `get_rope_index` of transformers' models.
    """
    if grid is None:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    rows, columns = grid
    before, after = np.arange(start), np.arange(length - start - rows * columns) + start + max(rows, columns)
    image = np.stack([np.zeros(rows * columns, int), *np.indices((rows, columns)).reshape(2, -1)]) + start
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(after, (3, 1))], axis=1).astype(np.int32)
