"""Llama-3.2-Vision (arXiv 2407.21783), as `metaembed_jax.backbones` asks for."""

from metaembed_jax.backbones.llama_vision.config import TITLE, Config
from metaembed_jax.backbones.llama_vision.export import SENTENCE_TRANSFORMERS, USAGE
from metaembed_jax.backbones.llama_vision.flops import parts
from metaembed_jax.backbones.llama_vision.inputs import PAD_TOKEN, PROMPT_WORDS, SPECIAL_TOKENS, Images, Processor
from metaembed_jax.backbones.llama_vision.network import Backbone
from metaembed_jax.backbones.llama_vision.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

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
