"""Llama-3.2-Vision: tiled images, and text that attends to them in cross-attention layers."""

from metaembed_jax.backbones.llama_vision.config import TITLE, Config
from metaembed_jax.backbones.llama_vision.inputs import PAD_TOKEN, SPECIAL_TOKENS, Images, Processor
from metaembed_jax.backbones.llama_vision.network import Backbone
from metaembed_jax.backbones.llama_vision.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

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
