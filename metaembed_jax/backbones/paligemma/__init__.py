"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555), as `metaembed_jax.backbones` asks for."""

from metaembed_jax.backbones.paligemma.config import TITLE, Config
from metaembed_jax.backbones.paligemma.export import SENTENCE_TRANSFORMERS, USAGE
from metaembed_jax.backbones.paligemma.flops import parts
from metaembed_jax.backbones.paligemma.inputs import PAD_TOKEN, PROMPT_WORDS, SPECIAL_TOKENS, Images, Processor
from metaembed_jax.backbones.paligemma.network import Backbone
from metaembed_jax.backbones.paligemma.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

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
