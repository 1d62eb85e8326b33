"""Images to uint8 patches, with the very numbers of the checkpoint's Hugging Face image processor (its Pillow implementation).

P patches, U units (merged 2x2 patches), X numbers in a patch.

A patch row is one frame, in (channel, y, x) order. Patches are ordered by window, then by unit, then by patch in the unit, each
level in raster order; windows that stick out of the image are padded to their full size, so that attention within a window is
a reshape. Six columns and five rows of units, in windows of 4x4, each unit with its raster number:

     0  1  2  3 |  4  5  .  .
     6  7  8  9 | 10 11  .  .
    12 13 14 15 | 16 17  .  .        slots  0..15 hold units 0 1 2 3 6 7 8 9 12 ...
    18 19 20 21 | 22 23  .  .        slots 16..31 hold units 4 5 . . 10 11 . . 16 ...
    ------------+------------
    24 25 26 27 | 28 29  .  .
     .  .  .  . |  .  .  .  .
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones.fields import check_processing, check_sizes
from metaembed_jax.backbones.qwen2_5_vl.config import Config
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become patches.

    Attributes:
      min_pixels, max_pixels: bounds of the resized area (kept where `smart_resize` can keep them).
      patch_size: side of a patch, in pixels.
      merge_size: side of a unit, in patches; a unit is one visual token.
      window_size: side of an attention window, in pixels.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 112

    def __post_init__(self):
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UserError(f"image sizes: min_pixels={self.min_pixels} must be between 1 and max_pixels={self.max_pixels}")
        if self.window_units < 1:
            raise UserError(f"image windows: window_size={self.window_size} is below one visual token, {self.unit_size} pixels")

    @property
    def unit_size(self) -> int:
        """Side of a unit, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def window_units(self) -> int:
        """Side of a window, in units."""
        return self.window_size // self.unit_size

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: Config, max_visual_tokens: int) -> "Images":
        """From the content of preprocessor_config.json, where sizes stand as `min_pixels` or as `size.shortest_edge`.

        Args:
          config: of the architecture, which says how large patches, units and windows are.
          max_visual_tokens: cap on the visual tokens of an image.

        Raises:
          UserError: bounds that exclude each other, or a processing that is not this family's.
        """
        check_processing(
            preprocessor, {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
        )
        size = preprocessor.get("size") or {}
        whole = {key: preprocessor.get(key) for key in ("min_pixels", "max_pixels")}
        check_sizes(whole | size if isinstance(size, dict) else {"size": size})
        smallest = whole["min_pixels"] or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        largest = whole["max_pixels"] or size.get("max_pixels") or size.get("longest_edge") or 1280 * 28 * 28
        return cls._of(config, smallest, largest, max_visual_tokens)

    @classmethod
    def from_run(cls, data: ConfigDict, config: Config, max_visual_tokens: int | None) -> "Images":
        """From `config.data` of a run; see `from_preprocessor`.

        Raises:
          UserError: bounds that exclude each other.
        """
        return cls._of(config, data.min_pixels, data.max_pixels, max_visual_tokens)

    @classmethod
    def _of(cls, config: Config, smallest: int, largest: int, max_visual_tokens: int | None) -> "Images":
        vision = config.vision_config
        if max_visual_tokens is not None:
            largest = min(largest, max_visual_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2)
        return cls(smallest, largest, vision.patch_size, vision.spatial_merge_size, vision.window_size)

    def to_preprocessor(self, config: Config) -> dict:
        """The content of preprocessor_config.json; the way back from `from_preprocessor`."""
        vision = config.vision_config
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": 2,
            "merge_size": self.merge_size,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
            "rescale_factor": 1 / 255,
        }


class Patches(NamedTuple):
    """One image. P counts the padding of windows too.

    Attributes:
      patches: pixels, zero in padding.
      positions: row and column of each patch in the image's grid of patches, zero in padding.
      mask: true for patches of the image.
      grid: rows and columns of units.
      raster: for each unit in raster order, its slot in window order, 0 <= slot < P / merge_size**2.
    """

    patches: UInt8[np.ndarray, "P X"]
    positions: Int[np.ndarray, "P 2"]
    mask: Bool[np.ndarray, "P"]
    grid: tuple[int, int]
    raster: Int[np.ndarray, "U"]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those that the network reads, by their names in a batch."""
        return {"patches": self.patches, "patch_positions": self.positions, "patch_mask": self.mask}


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, the aspect ratio about kept, the area within bounds where both allow it.

    The rule of `transformers.models.qwen2_vl`, rounding included; thin images and narrow bounds can exceed `max_pixels`.

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


def window_layout(rows: int, columns: int, config: Images) -> Int[np.ndarray, "slots"]:
    """The raster number of the unit in each slot of window order, -1 in padding (drawn at the top of this file)."""
    side = config.window_units
    units = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int32)
    units[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    return rearrange(units, "(r y) (c x) -> (r c y x)", y=side, x=side)


def patchify(image: Image.Image, config: Images, name: str = "image") -> Patches:
    """Resizes an RGB image and cuts it into patches, ordered by window and padded.

    Raises:
      UserError: the aspect ratio is out of bounds; names `name`.
    """
    try:
        height, width = smart_resize(image.height, image.width, config.unit_size, config.min_pixels, config.max_pixels)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // config.unit_size, width // config.unit_size
    merge = {"m": config.merge_size, "n": config.merge_size}
    units = rearrange(pixels, "(r m y) (c n x) k -> (r c) (m n) (k y x)", y=config.patch_size, x=config.patch_size, **merge)
    places = np.indices((rows * config.merge_size, columns * config.merge_size), np.int32)
    places = rearrange(places, "k (r m) (c n) -> (r c) (m n) k", **merge)

    layout = window_layout(rows, columns, config)
    raster = np.empty(rows * columns, np.int32)
    slots = np.flatnonzero(layout >= 0)
    raster[layout[slots]] = slots

    def place(values):
        ordered = np.zeros((len(layout), *values.shape[1:]), values.dtype)
        ordered[raster] = values
        return ordered.reshape(-1, values.shape[-1])

    mask = np.repeat(layout >= 0, config.merge_size**2)
    return Patches(place(units), place(places), mask, (rows, columns), raster)
