"""Inputs of Llama-3.2-Vision: its prompts, and images cut into tiles.

    text          <|begin_of_text|>{prefix}{text}<|end_of_text|>
    image + text  <|image|><|begin_of_text|>{prefix}{text}<|end_of_text|>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, and empty for documents. Queries end with ten more <|end_of_text|> and "\\n". Meta Tokens are
not part of a prompt: they get their positions in a row.

S tokens, P patches, X numbers in a patch.
"""

import dataclasses
import math
from typing import Self

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8
from PIL import Image

from metaembed_jax.backbones.config_checks import check_processing
from metaembed_jax.backbones.family import PixelBounds
from metaembed_jax.backbones.llama_vision.config import BEGIN, END, IMAGE, TITLE, Config
from metaembed_jax.inputs.processors import Grid, Prompt, PromptProcessor, no_room
from metaembed_jax.inputs.texts import IMAGE_ALONE, QUERY

SPECIAL_TOKENS = (BEGIN, END, IMAGE)
PAD_TOKEN = END
PROMPT_WORDS = (QUERY, IMAGE_ALONE)  # around the text of a prompt
PROCESSING = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"), True) | {"resample": 2}


@dataclasses.dataclass(frozen=True)
class Images:
    """The processing of images into patches: an image is scaled without distortion to a canvas of tiles.

    An image has no tokens in the sequence, and few tiles, so bounds on pixels or visual tokens change nothing.

    Attributes:
      tile_size, patch_size: side of a tile and of a patch, in pixels.
      max_tiles: most tiles of an image.
      arrangements: (rows, columns) of tiles that a canvas may have.
    """

    tile_size: int
    patch_size: int
    max_tiles: int
    arrangements: tuple[tuple[int, int], ...]

    @property
    def cell_size(self) -> int:
        """Side of a cell of a grid, in pixels."""
        return self.tile_size

    @property
    def image_patches(self) -> int:
        """Patches of an image of any size: those of `max_tiles` tiles."""
        return self.max_tiles * (self.tile_size // self.patch_size) ** 2

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> Self:
        """Read the content of preprocessor_config.json.

        Raises:
          UserError: it differs from the architecture.
        """
        check_processing(preprocessor, PROCESSING | _sizes(config))
        return cls.from_config(config)

    @classmethod
    def from_run(cls, data: PixelBounds, config: Config, max_visual_tokens: int | None) -> Self:
        """Return the images of the architecture; neither the data of a run's config nor a cap changes them."""
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Return the images of the architecture."""
        vision = config.vision_config
        return cls(vision.image_size, vision.patch_size, vision.max_num_tiles, tuple(vision.arrangements))

    def to_preprocessor(self, config: Config) -> dict:
        """Return the content of preprocessor_config.json; inverse of `from_preprocessor`."""
        return {
            "image_processor_type": "MllamaImageProcessor",
            "processor_class": "MllamaProcessor",
            **PROCESSING,
            **_sizes(config),
            **config.stored_pixels(),
        }


def _sizes(config: Config) -> dict:
    """Return the keys of preprocessor_config.json that follow from the architecture."""
    vision = config.vision_config
    return {"size": {"height": vision.image_size, "width": vision.image_size}, "max_image_tiles": vision.max_num_tiles}


class Processor(PromptProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title, special_tokens, filler = TITLE, SPECIAL_TOKENS, END
    images: Images

    def _prompt(self, grid: Grid | None, side: str, has_text: bool, with_image: bool) -> Prompt:
        ids, prefix = self._tokenizer.ids, self._prefix(side)
        tail = [ids[END], *self._suffix(side)]
        if not with_image:
            return Prompt([ids[BEGIN]], prefix, "", tail)
        return Prompt([ids[IMAGE], ids[BEGIN]], prefix if has_text else prefix + IMAGE_ALONE, "", tail)

    def _grid(self, width: int, height: int, most_tokens: int | None, most_patches: int | None, name: str) -> Grid:
        """Return the canvas of tiles. With padding, all have the same number of patches, so an image never shrinks."""
        patches = self.images.image_patches
        if most_tokens is not None and most_patches is not None and most_patches < patches:
            raise no_room(name, most_tokens, most_patches, 0, patches)
        return Grid(*arrange(height, width, self.images), patches)

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        return patchify(image, (grid.rows, grid.columns), self.images)

    def _visual(self, tokens: Int[np.ndarray, "S"], head: int, grid: Grid | None) -> Int[np.ndarray, "S"]:
        """Return -1 for every token: images have none in the sequence."""
        return np.full(len(tokens), -1, np.int32)


def patchify(image: Image.Image, arrangement: tuple[int, int], images: Images) -> dict[str, np.ndarray]:
    """Scale an RGB image, pad it with black, cut it into tiles in raster order and the tiles into patches; add tiles of padding.

    Returns:
      patches [P, X] uint8, each in (channel, y, x) order; patch_mask [P] bool and aspect_ratio [P] int32: false and 0 in padding.
    """
    rows, columns = arrangement
    height, width = fit(image.height, image.width, arrangement, images.tile_size)
    canvas = np.zeros((rows * images.tile_size, columns * images.tile_size, 3), np.uint8)
    canvas[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    side = dict(r=rows, c=columns, y=images.patch_size, x=images.patch_size)
    patches: UInt8[np.ndarray, "P X"] = rearrange(canvas, "(r i y) (c j x) k -> (r c i j) (k y x)", **side)
    mask = np.arange(images.image_patches) < len(patches)
    return {
        "patches": np.pad(patches, ((0, len(mask) - len(patches)), (0, 0))),
        "patch_mask": mask,
        "aspect_ratio": np.where(mask, images.arrangements.index(arrangement) + 1, 0).astype(np.int32),
    }


def arrange(height: int, width: int, images: Images) -> tuple[int, int]:
    """Return the rows and columns of tiles that enlarge an image least; if it must shrink, those that shrink it least.

    Among equals it is the smallest canvas, then the first; the rule of `transformers.models.mllama`.
    """

    def rank(arrangement: tuple[int, int]) -> tuple[bool, float, int]:
        scale = min(arrangement[0] * images.tile_size / height, arrangement[1] * images.tile_size / width)
        return scale < 1, scale if scale >= 1 else -scale, math.prod(arrangement)

    return min(images.arrangements, key=rank)


def fit(height: int, width: int, arrangement: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """Return the size of an image on its canvas: inside it, with the same aspect ratio, enlarged to at most a tile's side."""
    most_height, most_width = (
        min(max(side, tile_size), count * tile_size) for side, count in zip((height, width), arrangement, strict=True)
    )
    if most_width / width < most_height / height:
        return min(math.floor(height * (most_width / width)) or 1, most_height), most_width
    return most_height, min(math.floor(width * (most_height / height)) or 1, most_width)
