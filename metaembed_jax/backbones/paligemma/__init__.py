"""PaliGemma 1 and 2: what the rest of the package knows of them."""

from metaembed_jax.backbones.paligemma.config import TITLE, Config
from metaembed_jax.backbones.paligemma.inputs import PAD_TOKEN, SPECIAL_TOKENS, Images, Processor
from metaembed_jax.backbones.paligemma.network import Backbone
from metaembed_jax.backbones.paligemma.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

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
