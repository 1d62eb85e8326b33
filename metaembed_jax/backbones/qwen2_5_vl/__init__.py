"""Qwen2.5-VL (arXiv 2502.13923), as `metaembed_jax.backbones` asks for."""

from metaembed_jax.backbones.qwen.export import SENTENCE_TRANSFORMERS, USAGE
from metaembed_jax.backbones.qwen.inputs import PAD_TOKEN, PROMPT_WORDS, SPECIAL_TOKENS
from metaembed_jax.backbones.qwen2_5_vl.config import TITLE, Config
from metaembed_jax.backbones.qwen2_5_vl.flops import parts
from metaembed_jax.backbones.qwen2_5_vl.images import Images
from metaembed_jax.backbones.qwen2_5_vl.inputs import Processor
from metaembed_jax.backbones.qwen2_5_vl.network import Backbone
from metaembed_jax.backbones.qwen2_5_vl.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

__all__ = [
    "EMBEDDING_KEY",
    "KEYS",
    "PAD_TOKEN",
    "PROMPT_WORDS",
    "SENTENCE_TRANSFORMERS",
    "SPECIAL_TOKENS",
    "TITLE",
    "UNUSED_KEYS",
    "USAGE",
    "Backbone",
    "Config",
    "Images",
    "Processor",
    "canonical_key",
    "parts",
    "stored_key",
]
