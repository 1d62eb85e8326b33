"""Inputs of PaliGemma: its prompts, and images that are stretched to one square.

    text          <bos>{prefix}{text}\\n
    image + text  <image>...<image><bos>{prefix}{text}\\n
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, and empty for documents. Queries end with ten <pad> and "\\n" in place of "\\n". These <pad> are
tokens of the prompt like any other. An image has one <image> for each of its patches.
"""

import dataclasses
from typing import Self

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8
from PIL import Image

from metaembed_jax.backbones.config_checks import check_processing
from metaembed_jax.backbones.family import PixelBounds
from metaembed_jax.backbones.paligemma.config import IMAGE_TOKEN, PAD_TOKEN, START_TOKEN, TITLE, Config
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import Grid, Prompt, PromptProcessor, no_room
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY

SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, IMAGE_TOKEN)
PROMPT_WORDS = (QUERY, IMAGE_ALONE + "\n")  # around the text of a prompt


@dataclasses.dataclass(frozen=True)
class Images:
    """The processing of images into patches: all are stretched to one square, whatever their shape.

    Attributes:
      image_size: side of the square, in pixels.
      patch_size: side of a patch, in pixels.
    """

    image_size: int
    patch_size: int

    @property
    def cell_size(self) -> int:
        """Side of a cell of a grid, in pixels."""
        return self.patch_size

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> Self:
        """Read the content of preprocessor_config.json. The model has one size of images, so the cap changes nothing.

        Raises:
          UserError: the processing is not PaliGemma's, or the size is not the model's.
        """
        check_processing(preprocessor, {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3})
        side = config.vision_config.image_size
        if (size := preprocessor.get("size") or {"height": 224, "width": 224}) != {"height": side, "width": side}:
            raise UserError(f"preprocessor_config.json: size is {size!r}; config.json has images of {side} x {side} pixels")
        return cls.from_config(config)

    @classmethod
    def from_run(cls, data: PixelBounds, config: Config, max_visual_tokens: int | None) -> Self:
        """Return the images of the architecture; neither the data of a run's config nor a cap changes them."""
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Return the images of the architecture."""
        return cls(config.vision_config.image_size, config.vision_config.patch_size)

    def to_preprocessor(self, config: Config) -> dict:
        """Return the content of preprocessor_config.json; inverse of `from_preprocessor`."""
        return {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": 3,
            **config.stored_pixels(),
            "image_seq_length": config.vision_config.patches,
        }


def patchify(image: Image.Image, images: Images) -> UInt8[np.ndarray, "P X"]:
    """Stretch an RGB image to a square and cut it into patches in raster order, each in (channel, y, x) order."""
    square = image.resize((images.image_size, images.image_size), Image.Resampling.BICUBIC)
    size = images.patch_size
    return np.ascontiguousarray(rearrange(np.asarray(square), "(row y) (column x) c -> (row column) (c y x)", y=size, x=size))


class Processor(PromptProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title, special_tokens, filler = TITLE, SPECIAL_TOKENS, PAD_TOKEN
    images: Images

    @property
    def page_pixels(self) -> int:
        """Pixels at which a page is drawn: twice those of the square, so that a page up to 2:1 covers it on both sides."""
        return 2 * super().page_pixels

    def _prompt(self, grid: Grid | None, side: str, has_text: bool, with_image: bool) -> Prompt:
        ids, prefix = self._tokenizer.ids, self._prefix(side)
        visual = [ids[IMAGE_TOKEN]] * (grid.patches if grid else 0)
        before = prefix if has_text or not with_image else prefix + IMAGE_ALONE
        return Prompt([*visual, ids[START_TOKEN]], before, "" if side == "query" else "\n", [*self._suffix(side)])

    def _grid(self, width: int, height: int, most_tokens: int | None, most_patches: int | None, name: str) -> Grid:
        """Return the only grid of the model; it does not shrink."""
        side = self.images.image_size // self.images.patch_size
        if most_tokens is not None and most_patches is not None and min(most_tokens, most_patches) < side**2:
            raise no_room(name, most_tokens, most_patches, side**2, side**2)
        return Grid(side, side, side**2)

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        return {"patches": patchify(image, self.images)}

    def _visual(self, tokens: Int[np.ndarray, "S"], head: int, grid: Grid | None) -> Int[np.ndarray, "S"]:
        visual = np.full(len(tokens), -1, np.int32)
        if grid is not None:
            visual[: grid.patches] = np.arange(grid.patches)
        return visual
