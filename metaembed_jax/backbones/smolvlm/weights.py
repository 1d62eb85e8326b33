"""Tensors of SmolVLM checkpoints and the parameters that they become."""

from metaembed_jax.backbones.conversion import linear, norm, patches, same

TEXT, VISION = "text_model.", "vision_model."
BLOCK, LAYER = VISION + "encoder.layers.{}.", TEXT + "layers.{}."

# Every parameter, and the tensor of a checkpoint that it is read from.
KEYS = {
    "embedding": same(TEXT + "embed_tokens.weight"),
    "final_norm.scale": same(TEXT + "norm.weight"),
    "layers.input_norm.scale": same(LAYER + "input_layernorm.weight"),
    "layers.mlp_norm.scale": same(LAYER + "post_attention_layernorm.weight"),
    **linear("layers.query", LAYER + "self_attn.q_proj", bias=False),
    **linear("layers.key", LAYER + "self_attn.k_proj", bias=False),
    **linear("layers.value", LAYER + "self_attn.v_proj", bias=False),
    **linear("layers.output", LAYER + "self_attn.o_proj", bias=False),
    **linear("layers.mlp.gate", LAYER + "mlp.gate_proj", bias=False),
    **linear("layers.mlp.up", LAYER + "mlp.up_proj", bias=False),
    **linear("layers.mlp.down", LAYER + "mlp.down_proj", bias=False),
    "vision.patch_embedding.kernel": patches(VISION + "embeddings.patch_embedding.weight"),
    "vision.patch_embedding.bias": same(VISION + "embeddings.patch_embedding.bias"),
    "vision.positions": same(VISION + "embeddings.position_embedding.weight"),
    **norm("vision.blocks.norm1", BLOCK + "layer_norm1"),
    **norm("vision.blocks.norm2", BLOCK + "layer_norm2"),
    **linear("vision.blocks.query", BLOCK + "self_attn.q_proj", bias=True),
    **linear("vision.blocks.key", BLOCK + "self_attn.k_proj", bias=True),
    **linear("vision.blocks.value", BLOCK + "self_attn.v_proj", bias=True),
    **linear("vision.blocks.output", BLOCK + "self_attn.out_proj", bias=True),
    **linear("vision.blocks.mlp.up", BLOCK + "mlp.fc1", bias=True),
    **linear("vision.blocks.mlp.down", BLOCK + "mlp.fc2", bias=True),
    **norm("vision.final_norm", VISION + "post_layernorm"),
    **linear("vision.projector", "connector.modality_projection.proj", bias=False),
}

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding


def canonical_key(key: str) -> str:
    """The name in `KEYS` of a tensor of any layout in circulation: as released, with `model.` in front; or of a model without its
    output layer."""
    return key.removeprefix("model.")


def stored_key(key: str) -> str:
    """The name of a tensor of `KEYS` in transformers' `Idefics3Model`; the way back from `canonical_key`."""
    return key
