"""SmolVLM (arXiv 2504.05299; transformers' `idefics3`), as `metaembed_jax.backbones` asks for."""

from metaembed_jax.backbones.smolvlm.config import TITLE, Config
from metaembed_jax.backbones.smolvlm.export import SENTENCE_TRANSFORMERS, USAGE
from metaembed_jax.backbones.smolvlm.flops import parts
from metaembed_jax.backbones.smolvlm.images import Images
from metaembed_jax.backbones.smolvlm.inputs import PAD_TOKEN, PROMPT_WORDS, SPECIAL_TOKENS, Processor
from metaembed_jax.backbones.smolvlm.network import Backbone
from metaembed_jax.backbones.smolvlm.weights import EMBEDDING_KEY, KEYS, UNUSED_KEYS, canonical_key, stored_key

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
