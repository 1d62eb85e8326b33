"""SmolVLM (arXiv 2504.05299; transformers' `idefics3`)."""

from metaembed_jax.backbones.family import Family
from metaembed_jax.backbones.smolvlm import config, images, inputs, network, weights

FAMILY = Family(
    Config=config.Config,
    Images=images.Images,
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
