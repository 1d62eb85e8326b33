"""Tensors of PaliGemma checkpoints and the parameters that they become."""

from metaembed_jax.backbones.conversion import linear, patches, same

LANGUAGE, VISION = "language_model.model.", "vision_tower.vision_model."

# Every parameter of either version, and the tensor of a checkpoint that it is read from.
KEYS = {
    "embedding": same(LANGUAGE + "embed_tokens.weight"),
    "final_norm.scale": same(LANGUAGE + "norm.weight"),
    "layers.input_norm.scale": same(LANGUAGE + "layers.{}.input_layernorm.weight"),
    "layers.mlp_norm.scale": same(LANGUAGE + "layers.{}.post_attention_layernorm.weight"),
    # Gemma 2 has these in its place: what follows attention there has the name of what comes before the feed-forward in Gemma.
    "layers.attention_post_norm.scale": same(LANGUAGE + "layers.{}.post_attention_layernorm.weight"),
    "layers.mlp_pre_norm.scale": same(LANGUAGE + "layers.{}.pre_feedforward_layernorm.weight"),
    "layers.mlp_post_norm.scale": same(LANGUAGE + "layers.{}.post_feedforward_layernorm.weight"),
    **linear("layers.query", LANGUAGE + "layers.{}.self_attn.q_proj", bias=False),
    **linear("layers.key", LANGUAGE + "layers.{}.self_attn.k_proj", bias=False),
    **linear("layers.value", LANGUAGE + "layers.{}.self_attn.v_proj", bias=False),
    **linear("layers.output", LANGUAGE + "layers.{}.self_attn.o_proj", bias=False),
    **linear("layers.mlp.gate", LANGUAGE + "layers.{}.mlp.gate_proj", bias=False),
    **linear("layers.mlp.up", LANGUAGE + "layers.{}.mlp.up_proj", bias=False),
    **linear("layers.mlp.down", LANGUAGE + "layers.{}.mlp.down_proj", bias=False),
    "vision.patch_embedding.kernel": patches(VISION + "embeddings.patch_embedding.weight"),
    "vision.patch_embedding.bias": same(VISION + "embeddings.patch_embedding.bias"),
    "vision.positions": same(VISION + "embeddings.position_embedding.weight"),
    "vision.blocks.norm1.scale": same(VISION + "encoder.layers.{}.layer_norm1.weight"),
    "vision.blocks.norm1.bias": same(VISION + "encoder.layers.{}.layer_norm1.bias"),
    "vision.blocks.norm2.scale": same(VISION + "encoder.layers.{}.layer_norm2.weight"),
    "vision.blocks.norm2.bias": same(VISION + "encoder.layers.{}.layer_norm2.bias"),
    **linear("vision.blocks.query", VISION + "encoder.layers.{}.self_attn.q_proj", bias=True),
    **linear("vision.blocks.key", VISION + "encoder.layers.{}.self_attn.k_proj", bias=True),
    **linear("vision.blocks.value", VISION + "encoder.layers.{}.self_attn.v_proj", bias=True),
    **linear("vision.blocks.output", VISION + "encoder.layers.{}.self_attn.out_proj", bias=True),
    **linear("vision.blocks.mlp.up", VISION + "encoder.layers.{}.mlp.fc1", bias=True),
    **linear("vision.blocks.mlp.down", VISION + "encoder.layers.{}.mlp.fc2", bias=True),
    "vision.final_norm.scale": same(VISION + "post_layernorm.weight"),
    "vision.final_norm.bias": same(VISION + "post_layernorm.bias"),
    **linear("vision.projector", "multi_modal_projector.linear", bias=True),
}

UNUSED_KEYS = ("language_model.lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding


def canonical_key(key: str) -> str:
    """The name in `KEYS` of a tensor of any layout in circulation.

    They are the released one, which `KEYS` has; that of transformers 5, without `vision_model`; and the names inside of its models,
    `language_model.layers`, with `model.` in front of all and `lm_head` beside it where there is an output layer.
    """
    key = key.removeprefix("model.")
    if key == "lm_head.weight":
        return UNUSED_KEYS[0]
    for start, whole in (("language_model.", LANGUAGE), ("vision_tower.", VISION)):
        if key.startswith(start) and not key.startswith(whole) and key not in UNUSED_KEYS:
            return whole + key.removeprefix(start)
    return key


def stored_key(key: str) -> str:
    """The name of a tensor of `KEYS` in transformers' `PaliGemmaModel`; the way back from `canonical_key`."""
    return key.replace(LANGUAGE, "language_model.", 1).replace(VISION, "vision_tower.", 1)
