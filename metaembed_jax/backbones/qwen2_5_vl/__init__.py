"""Qwen2.5-VL (arXiv 2502.13923)."""

from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.qwen.inputs import PAD_TOKEN, PROMPT_WORDS, SPECIAL_TOKENS
from metaembed_jax.backbones.qwen.weights import SENTENCE_TRANSFORMERS, UNUSED_KEYS, USAGE
from metaembed_jax.backbones.qwen2_5_vl import config, inputs, network, weights

FAMILY = Family(
    Config=config.Config,
    Images=inputs.Images,
    Processor=inputs.Processor,
    Backbone=network.Backbone,
    special_tokens=SPECIAL_TOKENS,
    pad_token=PAD_TOKEN,
    prompt_words=PROMPT_WORDS,
    weight_map=weights.WEIGHT_MAP,
    unused_keys=UNUSED_KEYS,
    canonical_key=weights.canonical_key,
    stored_key=weights.stored_key,
    flop_counts=network.flop_counts,
    usage=USAGE,
    sentence_transformers=SENTENCE_TRANSFORMERS,
)
