"""The prompts of Qwen2.5-VL: those of every Qwen-VL."""

from metaembed_jax.backbones.qwen import inputs
from metaembed_jax.backbones.qwen2_5_vl.config import TITLE


class Processor(inputs.Processor):
    """Turns items into examples."""

    title = TITLE
