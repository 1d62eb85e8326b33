"""Qwen3-VL (arXiv 2511.21631), dense."""

from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.qwen import export
from metaembed_jax.backbones.qwen import inputs as prompts
from metaembed_jax.backbones.qwen3_vl import config, flops, inputs, network, weights

FAMILY = Family(
    Config=config.Config,
    Images=inputs.Images,
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
