"""Images to uint8 patches, with the very numbers of the checkpoint's Hugging Face image processor (its Pillow implementation).

P patches, U units (merged 2x2 patches, each one visual token), X numbers in a patch.

A patch row is one frame, in (channel, y, x) order. Patches lie unit by unit, and in a unit in raster order; units as their family
has them (`Images.order`).
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones.fields import check_processing, check_sizes
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become patches.

    Attributes:
      min_pixels, max_pixels: bounds of the resized area (kept where `smart_resize` can keep them).
      patch_size: side of a patch, in pixels.
      merge_size: side of a unit, in patches.
      processor_class: transformers' name of the family's processor.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int = 2

    processor_class: ClassVar[str]

    def __post_init__(self):
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UserError(f"image sizes: min_pixels={self.min_pixels} must be between 1 and max_pixels={self.max_pixels}")

    @property
    def unit_size(self) -> int:
        """Side of a unit, in pixels."""
        return self.patch_size * self.merge_size

    def order(self, rows: int, columns: int) -> Int[np.ndarray, "slots"]:
        """The raster number of the unit in each slot, -1 in padding. Raster order, but for families that have another."""
        return np.arange(rows * columns, dtype=np.int32)

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: object, max_visual_tokens: int) -> "Images":
        """From the content of preprocessor_config.json, where sizes stand as `min_pixels` or as `size.shortest_edge`.

        Args:
          config: the family's `Config`, which says how large patches and units are.
          max_visual_tokens: cap on the visual tokens of an image.

        Raises:
          UserError: bounds that exclude each other, or a processing that is not Qwen's.
        """
        check_processing(
            preprocessor, {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
        )
        size = preprocessor.get("size") or {}
        whole = {key: preprocessor.get(key) for key in ("min_pixels", "max_pixels")}
        if not isinstance(size, dict):
            raise UserError(f"preprocessor_config.json: size is {size!r}, not an object of keys and values")
        check_sizes(whole | size)
        smallest = whole["min_pixels"] or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        largest = whole["max_pixels"] or size.get("max_pixels") or size.get("longest_edge") or 1280 * 28 * 28
        return cls.of(config, smallest, largest, max_visual_tokens)

    @classmethod
    def from_run(cls, data: ConfigDict, config: object, max_visual_tokens: int | None) -> "Images":
        """From `config.data` of a run; see `from_preprocessor`.

        Raises:
          UserError: bounds that exclude each other.
        """
        return cls.of(config, data.min_pixels, data.max_pixels, max_visual_tokens)

    @classmethod
    def of(cls, config: object, smallest: int, largest: int, max_visual_tokens: int | None) -> "Images":
        """With bounds of the area, and a cap on the visual tokens of an image."""
        vision = config.vision_config
        if max_visual_tokens is not None:
            largest = min(largest, max_visual_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2)
        return cls(smallest, largest, vision.patch_size, vision.spatial_merge_size)

    def to_preprocessor(self, config: object) -> dict:
        """The content of preprocessor_config.json; the way back from `from_preprocessor`."""
        vision = config.vision_config
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": self.processor_class,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": 2,
            "merge_size": self.merge_size,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
            "rescale_factor": 1 / 255,
        }


class Patches(NamedTuple):
    """One image. P counts padding among the units too.

    Attributes:
      patches: pixels, zero in padding.
      positions: row and column of each patch in the image's grid of patches, zero in padding.
      mask: true for patches of the image.
      grid: rows and columns of units.
      raster: for each unit in raster order, its slot, 0 <= slot < P / merge_size**2.
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


def patchify(image: Image.Image, images: Images, name: str = "image") -> Patches:
    """Resizes an RGB image and cuts it into patches.

    Raises:
      UserError: the aspect ratio is out of bounds; names `name`.
    """
    try:
        height, width = smart_resize(image.height, image.width, images.unit_size, images.min_pixels, images.max_pixels)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // images.unit_size, width // images.unit_size
    merge = {"m": images.merge_size, "n": images.merge_size}
    units = rearrange(pixels, "(r m y) (c n x) k -> (r c) (m n) (k y x)", y=images.patch_size, x=images.patch_size, **merge)
    places = np.indices((rows * images.merge_size, columns * images.merge_size), np.int32)
    places = rearrange(places, "k (r m) (c n) -> (r c) (m n) k", **merge)

    order = images.order(rows, columns)
    raster = np.empty(rows * columns, np.int32)
    slots = np.flatnonzero(order >= 0)
    raster[order[slots]] = slots

    def place(values):
        ordered = np.zeros((len(order), *values.shape[1:]), values.dtype)
        ordered[raster] = values
        return ordered.reshape(-1, values.shape[-1])

    mask = np.repeat(order >= 0, images.merge_size**2)
    return Patches(place(units), place(places), mask, (rows, columns), raster)
