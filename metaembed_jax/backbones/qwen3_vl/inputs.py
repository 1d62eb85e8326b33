"""The prompts and images of Qwen3-VL: those of every Qwen-VL, with units in raster order and no padding among them."""

from metaembed_jax.backbones.qwen import images, inputs
from metaembed_jax.backbones.qwen3_vl.config import TITLE


class Images(images.Images):
    """How images become patches."""

    processor_class = "Qwen3VLProcessor"


class Processor(inputs.Processor):
    """Turns items into examples."""

    title = TITLE
