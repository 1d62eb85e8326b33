"""Inputs of Qwen2.5-VL: the prompts of every Qwen-VL; patches by window, then by unit, then by patch in the unit.

Patches are stored in slots of the size of a window. A whole window fills a slot. Windows that the right or bottom edge of the image
cuts share slots, and have different numbers there. Six columns and five rows of units, in windows of 4x4, each unit with its raster
number:

     0  1  2  3 |  4  5
     6  7  8  9 | 10 11
    12 13 14 15 | 16 17        slot 0: window 0 is 0 1 2 3 6 7 8 9 12 ...
    18 19 20 21 | 22 23        slot 1: 4 5 10 11 16 17 22 23 (window 0), 24 25 26 27 (1), 28 29 (2), the rest is empty
    ------------+------
    24 25 26 27 | 28 29

P patches, U units of an image.
"""

import dataclasses
import functools
from typing import Any, Self

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.backbones.qwen import images, inputs
from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen2_5_vl.config import TITLE
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.processors import Grid


@dataclasses.dataclass(frozen=True)
class Images(images.Images):
    """The processing of images into patches.

    Attributes:
      window_size: side of an attention window, in pixels.
    """

    patch_size: int = 14
    window_size: int = 112

    processor_class = "Qwen2_5_VLProcessor"

    def __post_init__(self):
        super().__post_init__()
        if self.window_units < 1:
            raise UserError(
                f"image windows: window_size={self.window_size}: expected at least a visual token, {self.unit_size} pixels"
            )

    @property
    def window_units(self) -> int:
        """Side of a window, in units."""
        return self.window_size // self.unit_size

    @classmethod
    def limited(cls, config: Any, smallest: int, largest: int, max_visual_tokens: int | None) -> Self:
        """Return images with these bounds of the area, at most `max_visual_tokens` each, and the windows of the model."""
        bounded = super().limited(config, smallest, largest, max_visual_tokens)
        return dataclasses.replace(bounded, window_size=config.vision_config.window_size)

    def patches(self, rows: int, columns: int) -> int:
        """Return the number of patches of a grid of units, with the padding of its slots."""
        return slots(rows, columns, self.window_units).size * self.merge_size**2

    def order(self, rows: int, columns: int) -> tuple[Int[np.ndarray, "slots units"], Int[np.ndarray, "slots units"]]:
        """Return the raster number of the unit at each position of each slot, and its window's number there; -1 in padding."""
        units = slots(rows, columns, self.window_units)
        side, unit = self.window_units, np.maximum(units, 0)
        window = unit // columns // side * -(-columns // side) + unit % columns // side
        is_next = np.diff(window, axis=1, prepend=window[:, :1]) != 0
        return units, np.where(units >= 0, np.cumsum(is_next, axis=1), -1).astype(np.int32)


@functools.lru_cache(maxsize=4096)
def slots(rows: int, columns: int, side: int) -> Int[np.ndarray, "slots units"]:
    """Return the raster numbers of the units in each slot, -1 in padding; windows are packed by first fit, largest first."""
    raster = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    windows = [raster[y : y + side, x : x + side].ravel() for y in range(0, rows, side) for x in range(0, columns, side)]
    filled: list[list[np.ndarray]] = []
    room: list[int] = []
    for window in sorted(windows, key=len, reverse=True):
        slot = next((slot for slot, space in enumerate(room) if space >= len(window)), len(room))
        if slot == len(room):
            filled.append([])
            room.append(side * side)
        filled[slot].append(window)
        room[slot] -= len(window)
    units = np.full((len(filled), side * side), -1, np.int32)
    for slot, members in enumerate(filled):
        units[slot, : side * side - room[slot]] = np.concatenate(members)
    units.flags.writeable = False
    return units


class Processor(inputs.Processor):
    """Turns items into examples."""

    title = TITLE
    images: Images

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        """Return pixels, the position of each patch in its image, and its window's number in its slot, -1 in padding."""
        order, windows = (x.ravel() for x in self.images.order(grid.rows, grid.columns))
        is_padding = order < 0

        def ordered(values: np.ndarray) -> np.ndarray:
            values = values[order]
            values[is_padding] = 0
            return values.reshape(-1, values.shape[-1])

        patches, positions = map(ordered, to_units(image, grid, self.images))
        windows = np.repeat(windows, self.images.merge_size**2)
        return {"patches": patches, "patch_positions": positions, "windows": windows, "patch_mask": windows >= 0}

    def _order(self, grid: Grid) -> Int[np.ndarray, "U"]:
        order = self.images.order(grid.rows, grid.columns)[0].ravel()
        slots = np.flatnonzero(order >= 0)
        raster = np.empty(grid.rows * grid.columns, np.int32)
        raster[order[slots]] = slots
        return raster
