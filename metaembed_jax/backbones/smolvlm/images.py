"""Images to tiles and patches, with exactly the pixels of the checkpoint's Hugging Face image processor (the Pillow one).

P patches, X numbers in a patch.

An image is scaled so that its longest side has `longest_edge` pixels, and then resized to whole tiles. After several tiles comes
the whole image as one more tile. An image that does not fit is scaled to fewer tiles on its longest side, as transformers does with
a smaller `longest_edge`.

    1 2 3
    4 5 6   and 7, the whole image
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Self

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from metaembed_jax.backbones.config_checks import check_processing, check_sizes
from metaembed_jax.backbones.family import PixelBounds
from metaembed_jax.backbones.smolvlm.config import Config
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import Grid

MOST_TILES = 6  # on a side: the vocabulary has no markers for more
MOST_PIXELS = 4096  # on a side: the processor scales larger images twice
PROCESSING = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_image_splitting", "do_pad"), True)


@dataclasses.dataclass(frozen=True)
class Images:
    """The processing of images into patches.

    Attributes:
      longest_edge: longest side of an image after scaling, in pixels.
      tile_size, patch_size: side of a tile and of a patch, in pixels.
      tile_units: visual tokens of a tile.
    """

    longest_edge: int
    tile_size: int
    patch_size: int
    tile_units: int

    @property
    def cell_size(self) -> int:
        """Side of a cell of a grid, in pixels."""
        return self.tile_size

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> Self:
        """Read the content of preprocessor_config.json.

        Args:
          max_visual_tokens: most visual tokens of an image: `longest_edge` is lowered until a square image has no more. Every image
            has at least one tile.

        Raises:
          UserError: the processing is not SmolVLM's, or its tiles do not have the model's size.
        """
        check_processing(preprocessor, _processing(config))
        size = preprocessor.get("size") or {"longest_edge": 4 * 364}
        longest = size.get("longest_edge") if isinstance(size, dict) and len(size) == 1 else None
        if longest is None:
            raise UserError(f"preprocessor_config.json: size is {size!r}; expected longest_edge alone")
        check_sizes({"size.longest_edge": longest})
        if longest > (limit := _largest_side(config)):
            raise UserError(f"preprocessor_config.json: size.longest_edge is {longest}; expected at most {limit}")
        return cls.limited(config, longest, max_visual_tokens)

    @classmethod
    def from_run(cls, data: PixelBounds, config: Config, max_visual_tokens: int | None) -> Self:
        """Return the processing of a run's config: `longest_edge` is the whole tiles on the side of a square of `max_pixels`.

        Every image is enlarged to that size, so `min_pixels` changes nothing. `max_visual_tokens` is as in `from_preprocessor`.
        """
        tile = config.vision_config.image_size
        return cls.limited(
            config, tile * max(1, min(math.isqrt(data.max_pixels), _largest_side(config)) // tile), max_visual_tokens
        )

    @classmethod
    def limited(cls, config: Config, longest: int, max_visual_tokens: int | None) -> Self:
        """Return images with this longest side, and at most `max_visual_tokens` each."""
        vision = config.vision_config
        if max_visual_tokens is not None:
            tiles = max(1, max_visual_tokens // vision.tile_units - 1)  # without the whole image
            longest = min(longest, vision.image_size * math.isqrt(tiles))
        return cls(longest, vision.image_size, vision.patch_size, vision.tile_units)

    def to_preprocessor(self, config: Config) -> dict:
        """Return the content of preprocessor_config.json; inverse of `from_preprocessor`."""
        return {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            **_processing(config),
            "size": {"longest_edge": self.longest_edge},
            **config.stored_pixels(),
        }

    def grids(self, width: int, height: int) -> Iterator[Grid]:
        """Yield the grids that an image of this size, in pixels, may be cut into: that of transformers, then smaller ones."""
        natural = self._grid(width, height, self.longest_edge)
        yield natural
        for tiles in range(max(natural.rows, natural.columns) - 1, 0, -1):
            yield self._grid(width, height, tiles * self.tile_size)._replace(shrunk=True)

    def _grid(self, width: int, height: int, longest: int) -> Grid:
        rows, columns = tiling(*scaled(height, width, longest), self.tile_size)
        tiles = rows * columns + (rows * columns > 1)
        return Grid(rows, columns, tiles * (self.tile_size // self.patch_size) ** 2)


def patchify(image: Image.Image, grid: Grid, images: Images) -> UInt8[np.ndarray, "P X"]:
    """Scale an RGB image and cut it into patches: tile by tile, inside a tile in raster order, each in (channel, y, x) order.

    Args:
      grid: one of `Images.grids`.
    """
    lanczos, tile, patch = Image.Resampling.LANCZOS, images.tile_size, images.patch_size
    rows, columns = grid.rows, grid.columns
    longest = max(rows, columns) * tile if grid.shrunk else images.longest_edge
    height, width = scaled(image.height, image.width, longest)
    canvas = image.resize((width, height), lanczos).resize((columns * tile, rows * tile), lanczos)
    tiles = rearrange(np.asarray(canvas), "(r y) (c x) k -> (r c) y x k", r=rows, c=columns)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, np.asarray(canvas.resize((tile, tile), lanczos))[None]])
    covered = tile // patch * patch  # patches cover whole multiples of their side
    patches = rearrange(tiles[:, :covered, :covered], "t (i y) (j x) k -> (t i j) (k y x)", y=patch, x=patch)
    return np.ascontiguousarray(patches)


def scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the size with this longest side; the shorter side is even, by the rounding of transformers' idefics3."""

    def shorter(side: float) -> int:
        return max(1, int(side) + int(side) % 2)

    ratio = width / height
    return (shorter(longest / ratio), longest) if width >= height else (longest, shorter(longest * ratio))


def tiling(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return rows and columns of tiles: the longer side is rounded up to whole tiles, then the shorter one at the same ratio."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def _processing(config: Config) -> dict:
    """Return the keys of preprocessor_config.json that follow from the architecture."""
    lanczos = 1
    return PROCESSING | {"resample": lanczos, "max_image_size": {"longest_edge": config.vision_config.image_size}}


def _largest_side(config: Config) -> int:
    """Return the largest `longest_edge`."""
    return min(MOST_TILES * config.vision_config.image_size, MOST_PIXELS)
