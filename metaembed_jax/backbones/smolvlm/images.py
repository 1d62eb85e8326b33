"""Images to tiles and patches, with the very numbers of the checkpoint's Hugging Face image processor (its Pillow implementation).

P patches, X numbers in a patch.

An image is scaled until its longest side has `longest_edge` pixels, then stretched to whole tiles. Behind the tiles comes the whole
image once more, as one tile; where there is one tile anyway, it comes alone. An image that is to take less than that is scaled to
fewer tiles on its longest side, as transformers would with that for `longest_edge`.

    1 2 3
    4 5 6   and 7, which is all of 1 to 6
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones.fields import check_processing, check_sizes
from metaembed_jax.backbones.smolvlm.config import Config
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import Grid

MOST_TILES = 6  # on a side: the vocabulary has no markers for more
MOST_PIXELS = 4096  # on a side: beyond them the processor scales once more
PROCESSING = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_image_splitting", "do_pad"), True)


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become patches.

    Attributes:
      longest_edge: of an image as it is scaled, in pixels, whatever it was.
      tile_size, patch_size: sides, in pixels.
      tile_units: visual tokens of a tile.
    """

    longest_edge: int
    tile_size: int
    patch_size: int
    tile_units: int

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> "Images":
        """From the content of preprocessor_config.json.

        Args:
          max_visual_tokens: cap on the visual tokens of an image. It lowers `longest_edge` to so many tiles that even a square
            image keeps it; one tile is read whatever the cap.

        Raises:
          UserError: a processing that is not SmolVLM's, or tiles that are not the model's.
        """
        check_processing(preprocessor, _processing(config))
        size = preprocessor.get("size") or {"longest_edge": 4 * 364}
        longest = size.get("longest_edge") if isinstance(size, dict) and len(size) == 1 else None
        if longest is None:
            raise UserError(f"preprocessor_config.json: size is {size!r}, which has no longest_edge alone")
        check_sizes({"size.longest_edge": longest})
        if longest > (most := _most(config)):
            raise UserError(f"preprocessor_config.json: size.longest_edge is {longest}; at most {most} are read")
        return cls._of(config, longest, max_visual_tokens)

    @classmethod
    def from_run(cls, data: ConfigDict, config: Config, max_visual_tokens: int | None) -> "Images":
        """From `config.data` of a run: whole tiles on the longest side, so many that a square of it has at most `max_pixels`.

        As every image is enlarged to that, `min_pixels` has no say. For the cap see `from_preprocessor`.
        """
        tile = config.vision_config.image_size
        return cls._of(config, tile * max(1, min(math.isqrt(data.max_pixels), _most(config)) // tile), max_visual_tokens)

    @classmethod
    def _of(cls, config: Config, longest: int, max_visual_tokens: int | None) -> "Images":
        vision = config.vision_config
        if max_visual_tokens is not None:
            tiles = max(1, max_visual_tokens // vision.tile_units - 1)  # beside the whole image
            longest = min(longest, vision.image_size * math.isqrt(tiles))
        return cls(longest, vision.image_size, vision.patch_size, vision.tile_units)

    def to_preprocessor(self, config: Config) -> dict:
        """The content of preprocessor_config.json; the way back from `from_preprocessor`."""
        return {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            **_processing(config),
            "size": {"longest_edge": self.longest_edge},
            "image_mean": list(config.vision_config.image_mean),
            "image_std": list(config.vision_config.image_std),
            "rescale_factor": 1 / 255,
        }

    def grids(self, width: int, height: int) -> Iterator[Grid]:
        """Yield how an image of this size may be cut into tiles: as transformers has it, then smaller and smaller.

        Args:
          width, height: of the image, in pixels.
        """
        natural = self._grid(width, height, self.longest_edge)
        yield natural
        for tiles in range(max(natural.rows, natural.columns) - 1, 0, -1):
            yield self._grid(width, height, tiles * self.tile_size)._replace(shrunk=True)

    def _grid(self, width: int, height: int, longest: int) -> Grid:
        rows, columns = tiling(*scaled(height, width, longest), self.tile_size)
        tiles = rows * columns + (rows * columns > 1)
        return Grid(rows, columns, tiles * (self.tile_size // self.patch_size) ** 2)


def patchify(image: Image.Image, grid: Grid, images: Images) -> UInt8[np.ndarray, "P X"]:
    """The patches of an RGB image: tile by tile, in a tile in raster order, each in (channel, y, x) order.

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
    read = tile // patch * patch
    patches = rearrange(tiles[:, :read, :read], "t (i y) (j x) k -> (t i j) (k y x)", y=patch, x=patch)
    return np.ascontiguousarray(patches)


def scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size with the longest side so many pixels, the other even and at least one; the rounding of `transformers`' idefics3."""

    def other(side: float) -> int:
        return max(1, int(side) + int(side) % 2)

    ratio = width / height
    return (other(longest / ratio), longest) if width >= height else (longest, other(longest * ratio))


def tiling(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles: the longer side's next whole tile, then the shorter one's at the same ratio."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def _processing(config: Config) -> dict:
    """The keys of preprocessor_config.json that the architecture fixes; 1 is Lanczos' filter."""
    return PROCESSING | {"resample": 1, "max_image_size": {"longest_edge": config.vision_config.image_size}}


def _most(config: Config) -> int:
    """Pixels on the longest side at most."""
    return min(MOST_TILES * config.vision_config.image_size, MOST_PIXELS)
