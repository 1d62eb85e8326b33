"""Texts and images to what SmolVLM reads: its prompts, with markers between the tiles of an image.

    text          <|im_start|>User: {prefix}{text}<end_of_utterance>
    image + text  <|im_start|>User:{tiles}{prefix}{text}<end_of_utterance>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, which end with ten more <end_of_utterance> and "\\n", and empty for candidates. Meta Tokens are
no part of it: the network appends them. `tiles` of two rows and one column are, without the line breaks here,

    <fake_token_around_image><row_1_col_1><image>...<image>\\n
    <fake_token_around_image><row_2_col_1><image>...<image>\\n\\n
    <fake_token_around_image><global-img><image>...<image><fake_token_around_image>

and of an image that is one tile, the last of these lines. Vocabularies without tokens for the markers spell them.
"""

import numpy as np
from tokenizers import Tokenizer

from metaembed_jax.backbones.smolvlm.config import END, FRAME, IMAGE, PAD, START, TITLE
from metaembed_jax.backbones.smolvlm.images import MOST_TILES, Images, patchify
from metaembed_jax.inputs.examples import Example
from metaembed_jax.inputs.images import open_image
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY, read_item

PAD_TOKEN = PAD
WHOLE = "<global-img>"
MARKERS = (WHOLE, *(f"<row_{row + 1}_col_{column + 1}>" for row in range(MOST_TILES) for column in range(MOST_TILES)))
NEEDED = (START, PAD, END, FRAME, IMAGE)
SPECIAL_TOKENS = (*NEEDED, *MARKERS)  # of a vocabulary made from scratch; a checkpoint's may lack the markers
PROMPT_WORDS = ("User: " + QUERY, IMAGE_ALONE)  # what the prompts say around every text


class Processor(PromptProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title, special_tokens, filler = TITLE, NEEDED, END

    def __init__(self, tokenizer: Tokenizer, images: Images):
        super().__init__(tokenizer, images)
        self._markers = {marker: tokenizer.token_to_id(marker) for marker in MARKERS}

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        text, image = read_item(item, name)
        ids, arrays = self._tokenizer.ids, {}
        head, tail = [ids[START]], [ids[END], *suffix]
        if image is None:
            prefix = f"User: {prefix}"
        else:
            patches, tiles = patchify(open_image(image, name), self.images)
            arrays = {"patches": patches, "patch_mask": np.ones(len(patches), bool)}
            head += self._tokenizer.encode("User:") + self._tiles(*tiles)
            prefix = prefix if text else prefix + IMAGE_ALONE

        room = None if max_tokens is None else max_tokens - len(head) - len(tail)
        tokens = np.array(head + self._tokenizer.fit(prefix, text, "", room, name) + tail, np.int32)
        is_visual = tokens == ids[IMAGE]
        visual_index = np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)
        return Example(tokens, {"visual_index": visual_index}, arrays)

    def _tiles(self, rows: int, columns: int) -> list[int]:
        """The tokens of an image."""
        tokens = []
        for row in range(rows if rows * columns > 1 else 0):
            for column in range(columns):
                tokens += self._tile(f"<row_{row + 1}_col_{column + 1}>")
            tokens += self._tokenizer.encode("\n" if row + 1 < rows else "\n\n")
        return tokens + self._tile(WHOLE) + [self._tokenizer.ids[FRAME]]

    def _tile(self, marker: str) -> list[int]:
        ids, number = self._tokenizer.ids, self._markers[marker]
        spelled = self._tokenizer.encode(marker) if number is None else [number]
        return [ids[FRAME], *spelled, *[ids[IMAGE]] * self.images.tile_units]
