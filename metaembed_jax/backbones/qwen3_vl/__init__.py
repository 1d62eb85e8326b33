"""Qwen3-VL, dense."""

from metaembed_jax.backbones.qwen3_vl.config import TITLE, Config
from metaembed_jax.backbones.qwen3_vl.inputs import PAD_TOKEN, SPECIAL_TOKENS, Images, Processor
from metaembed_jax.backbones.qwen3_vl.network import Backbone
from metaembed_jax.backbones.qwen3_vl.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

__all__ = [
    "EMBEDDING_KEY",
    "KEYS",
    "PAD_TOKEN",
    "SPECIAL_TOKENS",
    "TITLE",
    "UNUSED_KEYS",
    "Backbone",
    "Config",
    "Images",
    "Processor",
    "canonical_key",
    "stored_key",
]
