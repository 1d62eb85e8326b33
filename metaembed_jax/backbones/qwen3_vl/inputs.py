"""Inputs of Qwen3-VL: the prompts and images of every Qwen-VL, with units in raster order and no padding among them."""

import numpy as np
from PIL import Image

from metaembed_jax.backbones.qwen import images, inputs
from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen3_vl.config import TITLE
from metaembed_jax.inputs.processors import Grid


class Images(images.Images):
    """The processing of images into patches."""

    processor_class = "Qwen3VLProcessor"


class Processor(inputs.Processor):
    """Turns items into examples."""

    title = TITLE
    images: Images

    def _patches(self, image: Image.Image, grid: Grid) -> dict[str, np.ndarray]:
        """Return pixels, the position of each patch in its image, and the rows and columns of that image."""
        patches, positions = (x.reshape(-1, x.shape[-1]) for x in to_units(image, grid, self.images))
        sides = np.array([grid.rows, grid.columns], np.int32) * self.images.merge_size
        return {"patches": patches, "patch_positions": positions, "patch_grid": np.broadcast_to(sides, positions.shape)}
