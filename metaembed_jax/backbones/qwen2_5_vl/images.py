"""The order of patches in Qwen2.5-VL: by window, then by unit, then by patch in the unit.

Each level is in raster order; windows that stick out of the image are padded to their full size, so that attention within a window
is a reshape. Six columns and five rows of units, in windows of 4x4, each unit with its raster number:

     0  1  2  3 |  4  5  .  .
     6  7  8  9 | 10 11  .  .
    12 13 14 15 | 16 17  .  .        slots  0..15 hold units 0 1 2 3 6 7 8 9 12 ...
    18 19 20 21 | 22 23  .  .        slots 16..31 hold units 4 5 . . 10 11 . . 16 ...
    ------------+------------
    24 25 26 27 | 28 29  .  .
     .  .  .  . |  .  .  .  .
"""

import dataclasses

import numpy as np
from einops import rearrange
from jaxtyping import Int

from metaembed_jax.backbones.qwen import images
from metaembed_jax.backbones.qwen2_5_vl.config import Config
from metaembed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Images(images.Images):
    """How images become patches.

    Attributes:
      window_size: side of an attention window, in pixels.
    """

    patch_size: int = 14
    window_size: int = 112

    processor_class = "Qwen2_5_VLProcessor"

    def __post_init__(self):
        super().__post_init__()
        if self.window_units < 1:
            raise UserError(f"image windows: window_size={self.window_size} is below one visual token, {self.unit_size} pixels")

    @property
    def window_units(self) -> int:
        """Side of a window, in units."""
        return self.window_size // self.unit_size

    @classmethod
    def of(cls, config: Config, smallest: int, largest: int, max_visual_tokens: int | None) -> "Images":
        """With bounds of the area, a cap on the visual tokens of an image, and the windows of the model."""
        chosen = super().of(config, smallest, largest, max_visual_tokens)
        return dataclasses.replace(chosen, window_size=config.vision_config.window_size)

    def order(self, rows: int, columns: int) -> Int[np.ndarray, "slots"]:
        """The raster number of the unit in each slot of window order, -1 in padding (drawn at the top of this file)."""
        side = self.window_units
        units = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int32)
        units[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        return rearrange(units, "(r y) (c x) -> (r c y x)", y=side, x=side)
