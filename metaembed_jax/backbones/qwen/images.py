"""Images to uint8 patches, with exactly the pixels of the checkpoint's Hugging Face image processor (the Pillow one).

P patches, U units (squares of N = 4 patches that are merged into a visual token), X numbers in a patch.

A patch is one frame, in (channel, y, x) order. Patches are ordered by unit, and inside a unit in raster order. The order of units
depends on the family.
"""

import dataclasses
import math
from typing import ClassVar, Self

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8
from PIL import Image

from metaembed_jax.backbones.config_checks import check_processing, check_sizes
from metaembed_jax.backbones.family import PixelBounds
from metaembed_jax.backbones.qwen.config import QwenConfig
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO
from metaembed_jax.inputs.processors import Grid, no_room


@dataclasses.dataclass(frozen=True)
class Images:
    """The processing of images into patches.

    Attributes:
      min_pixels, max_pixels: bounds of the area after resizing (`smart_resize` may exceed them).
      patch_size: side of a patch, in pixels.
      merge_size: side of a unit, in patches.
      processor_class: name of the family's processor in transformers.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int = 2

    processor_class: ClassVar[str]

    def __post_init__(self):
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UserError(f"image sizes: min_pixels={self.min_pixels}: expected 1 to max_pixels={self.max_pixels}")

    @property
    def unit_size(self) -> int:
        """Side of a unit, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def cell_size(self) -> int:
        """Side of a cell of a grid, in pixels."""
        return self.unit_size

    def patches(self, rows: int, columns: int) -> int:
        """Return the number of patches of a grid of units, with the padding that a family needs."""
        return rows * columns * self.merge_size**2

    def grid(self, width: int, height: int, most_units: int | None, most_patches: int | None, name: str) -> Grid:
        """Return the grid that an image is cut into: that of `smart_resize` if it fits, otherwise the largest that fits.

        Args:
          width, height: size of the image in pixels.
          most_units, most_patches: limits of the grid; None: any number.
          name: name of the item, for errors.

        Raises:
          UserError: the aspect ratio is out of bounds, or no grid fits.
        """
        try:
            height, width = smart_resize(height, width, self.unit_size, self.min_pixels, self.max_pixels)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        natural = rows, columns = height // self.unit_size, width // self.unit_size
        if most_units is None or most_patches is None:
            return Grid(rows, columns, self.patches(rows, columns))
        bound = min(most_units, most_patches // self.merge_size**2)
        while bound >= 1:
            rows, columns = fit_grid(*natural, bound)
            if (patches := self.patches(rows, columns)) <= most_patches:
                return Grid(rows, columns, patches, (rows, columns) != natural)
            bound = rows * columns - 1
        raise no_room(name, most_units, most_patches, 1, self.patches(1, 1))

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: QwenConfig, max_visual_tokens: int) -> Self:
        """Read the content of preprocessor_config.json, which has sizes as `min_pixels` or as `size.shortest_edge`.

        Args:
          config: the family's `Config`, which has the sizes of patches and units.
          max_visual_tokens: most visual tokens of an image.

        Raises:
          UserError: the bounds exclude each other, or the processing is not Qwen's.
        """
        check_processing(
            preprocessor, {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
        )
        size = preprocessor.get("size") or {}
        bounds = {key: preprocessor.get(key) for key in ("min_pixels", "max_pixels")}
        if not isinstance(size, dict):
            raise UserError(f"preprocessor_config.json: size is {size!r}; expected an object of keys and values")
        check_sizes(bounds | size)
        smallest = bounds["min_pixels"] or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        largest = bounds["max_pixels"] or size.get("max_pixels") or size.get("longest_edge") or 1280 * 28 * 28
        return cls.limited(config, smallest, largest, max_visual_tokens)

    @classmethod
    def from_run(cls, data: PixelBounds, config: QwenConfig, max_visual_tokens: int | None) -> Self:
        """Read the data of a run's config; see `from_preprocessor`.

        Raises:
          UserError: the bounds exclude each other.
        """
        return cls.limited(config, data.min_pixels, data.max_pixels, max_visual_tokens)

    @classmethod
    def limited(cls, config: QwenConfig, smallest: int, largest: int, max_visual_tokens: int | None) -> Self:
        """Return images with these bounds of the area, and at most `max_visual_tokens` each."""
        vision = config.vision_config
        if max_visual_tokens is not None:
            largest = min(largest, max_visual_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2)
        return cls(smallest, largest, vision.patch_size, vision.spatial_merge_size)

    def to_preprocessor(self, config: QwenConfig) -> dict:
        """Return the content of preprocessor_config.json; inverse of `from_preprocessor`."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": self.processor_class,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": 2,
            "merge_size": self.merge_size,
            **config.stored_pixels(),
        }


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the size to resize to: multiples of `factor`, about the same aspect ratio, the area within bounds if possible.

    The rule of `transformers.models.qwen2_vl`, including its rounding. Thin images and narrow bounds can exceed `max_pixels`.

    Raises:
      UserError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(f"one side of a {width}x{height} image is over {MAX_ASPECT_RATIO} times the other; crop or pad it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def fit_grid(rows: int, columns: int, most_units: int) -> tuple[int, int]:
    """Return the largest grid of about the same aspect ratio with at most `most_units` units, at least one on a side."""
    if rows * columns <= most_units:
        return rows, columns
    units = rows * columns
    rows, columns = (max(1, math.isqrt(side**2 * most_units // units)) for side in (rows, columns))  # exact, unlike a float's root
    return (1, min(columns, most_units)) if rows == 1 else (min(rows, most_units // columns), columns)


def to_units(image: Image.Image, grid: Grid, images: Images) -> tuple[UInt8[np.ndarray, "U N X"], Int[np.ndarray, "U N 2"]]:
    """Resize an RGB image to a grid, and return the pixels of each unit's N patches, and the row and column of each patch."""
    size = grid.columns * images.unit_size, grid.rows * images.unit_size
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    merge = {"m": images.merge_size, "n": images.merge_size}
    units = rearrange(pixels, "(r m y) (c n x) k -> (r c) (m n) (k y x)", y=images.patch_size, x=images.patch_size, **merge)
    positions = np.indices((grid.rows * images.merge_size, grid.columns * images.merge_size), np.int32)
    return units, rearrange(positions, "k (r m) (c n) -> (r c) (m n) k", **merge)
