"""The prompts of Qwen2.5-VL: those of every Qwen-VL; and its patches, in slots of a window's size (`images`).

P patches, U units of an image.
"""

import numpy as np
from jaxtyping import Int
from PIL import Image

from metaembed_jax.backbones.qwen import inputs
from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen2_5_vl.config import TITLE
from metaembed_jax.inputs.processors import Grid


class Processor(inputs.Processor):
    """Turns items into examples."""

    title = TITLE

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        """Pixels, the position of each patch in its image, and the number of its window in its slot, -1 in padding."""
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
