"""Prompts and images of PaliGemma.

    text          <bos>{prefix}{text}\\n
    image + text  <image>...<image><bos>{prefix}{text}\\n
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, which end with ten <pad> and "\\n" in place of "\\n", and empty for candidates. These <pad> are
tokens of the prompt like any other. An image has one <image> for each of its patches.
"""

import dataclasses

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones.fields import check_processing
from metaembed_jax.backbones.paligemma.config import IMAGE_TOKEN, PAD_TOKEN, START_TOKEN, TITLE, Config
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import Example
from metaembed_jax.inputs.images import open_image
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY, read_item

SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, IMAGE_TOKEN)
PROMPT_WORDS = (QUERY, IMAGE_ALONE + "\n")  # what the prompts say around every text


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become patches: all are stretched to one square, whatever their shape.

    Attributes:
      image_size: its side, in pixels.
      patch_size: side of a patch, in pixels.
    """

    image_size: int
    patch_size: int

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> "Images":
        """From the content of preprocessor_config.json. No cap can make images smaller: the model knows one size.

        Raises:
          UserError: a processing that is not PaliGemma's, or a size that is not the model's.
        """
        check_processing(preprocessor, {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3})
        side = config.vision_config.image_size
        if (size := preprocessor.get("size") or {"height": 224, "width": 224}) != {"height": side, "width": side}:
            raise UserError(f"preprocessor_config.json: size is {size!r}, and config.json has images of {side} x {side} pixels")
        return cls.from_run(None, config, max_visual_tokens)

    @classmethod
    def from_run(cls, data: ConfigDict | None, config: Config, max_visual_tokens: int | None) -> "Images":
        """As the architecture of a run has them; `config.data` has no say in it, as no cap has."""
        return cls(config.vision_config.image_size, config.vision_config.patch_size)

    def to_preprocessor(self, config: Config) -> dict:
        """The content of preprocessor_config.json, which transformers reads."""
        return {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(config.vision_config.image_mean),
            "image_std": list(config.vision_config.image_std),
            "image_seq_length": config.vision_config.patches,
        }


def patchify(image: Image.Image, images: Images) -> UInt8[np.ndarray, "P X"]:
    """Patches of an RGB image in raster order, each in (channel, y, x) order."""
    square = image.resize((images.image_size, images.image_size), Image.Resampling.BICUBIC)
    size = images.patch_size
    return np.ascontiguousarray(rearrange(np.asarray(square), "(row y) (column x) c -> (row column) (c y x)", y=size, x=size))


class Processor(PromptProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title, special_tokens, filler = TITLE, SPECIAL_TOKENS, PAD_TOKEN

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        text, image = read_item(item, name)
        patches = None if image is None else patchify(open_image(image, name), self.images)
        visual = 0 if patches is None else len(patches)
        head = [self._tokenizer.ids[IMAGE_TOKEN]] * visual + [self._tokenizer.ids[START_TOKEN]]
        if visual and not text:
            prefix += IMAGE_ALONE

        room = None if max_tokens is None else max_tokens - len(head) - len(suffix)
        tokens = np.array(head + self._tokenizer.fit(prefix, text, "" if suffix else "\n", room, name) + suffix, np.int32)
        visual_index = np.full(len(tokens), -1, np.int32)
        visual_index[:visual] = np.arange(visual)
        arrays = {"patches": patches, "patch_mask": np.ones(visual, bool)} if visual else {}
        return Example(tokens, {"visual_index": visual_index}, arrays)
