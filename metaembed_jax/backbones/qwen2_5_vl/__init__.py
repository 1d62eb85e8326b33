"""Qwen2.5-VL (arXiv 2502.13923)."""

from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.qwen import export
from metaembed_jax.backbones.qwen import inputs as prompts
from metaembed_jax.backbones.qwen2_5_vl import config, flops, images, inputs, network, weights

FAMILY = Family(
    Config=config.Config,
    Images=images.Images,
    Processor=inputs.Processor,
    Backbone=network.Backbone,
    special_tokens=prompts.SPECIAL_TOKENS,
    pad_token=prompts.PAD_TOKEN,
    prompt_words=prompts.PROMPT_WORDS,
    weight_map=weights.KEYS,
    unused_keys=weights.UNUSED_KEYS,
    canonical_key=weights.canonical_key,
    stored_key=weights.stored_key,
    flop_counts=flops.parts,
    usage=export.USAGE,
    sentence_transformers=export.SENTENCE_TRANSFORMERS,
)
