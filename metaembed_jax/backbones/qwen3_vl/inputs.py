"""The prompts and images of Qwen3-VL: those of the other Qwen-VL families, with patches in units one after the other."""

from metaembed_jax.backbones.qwen3_vl.config import TITLE
from metaembed_jax.backbones.qwen_inputs import PAD_TOKEN, SPECIAL_TOKENS, QwenImages, QwenProcessor

__all__ = ["PAD_TOKEN", "SPECIAL_TOKENS", "Images", "Processor"]


class Images(QwenImages):
    """How images become patches."""

    processor_class = "Qwen3VLProcessor"


class Processor(QwenProcessor):
    """Turns items into examples with a checkpoint's tokenizer."""

    title = TITLE
