"""Llama-3.2-Vision (arXiv 2407.21783)."""

from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.llama_vision import config, inputs, network, weights

FAMILY = Family(
    Config=config.Config,
    Images=inputs.Images,
    Processor=inputs.Processor,
    Backbone=network.Backbone,
    special_tokens=inputs.SPECIAL_TOKENS,
    pad_token=inputs.PAD_TOKEN,
    prompt_words=inputs.PROMPT_WORDS,
    weight_map=weights.WEIGHT_MAP,
    unused_keys=weights.UNUSED_KEYS,
    canonical_key=weights.canonical_key,
    stored_key=weights.stored_key,
    flop_counts=network.flop_counts,
    usage=weights.USAGE,
)
