"""The weight map of Qwen3-VL, and the names of tensors."""

from metaembed_jax.backbones.weight_map import decoder_layers, fused_linears, linear, norm, same, still_patches

# The tensor of a checkpoint that each parameter is read from.
WEIGHT_MAP = {
    "embedding": same("language_model.embed_tokens.weight"),
    "final_norm.scale": same("language_model.norm.weight"),
    **decoder_layers("language_model.layers.{}", attention_bias=False),
    "layers.query_norm.scale": same("language_model.layers.{}.self_attn.q_norm.weight"),
    "layers.key_norm.scale": same("language_model.layers.{}.self_attn.k_norm.weight"),
    "vision.patch_embedding.kernel": still_patches("visual.patch_embed.proj.weight"),
    "vision.patch_embedding.bias": same("visual.patch_embed.proj.bias"),
    "vision.position_table": same("visual.pos_embed.weight"),
    **norm("vision.blocks.norm1", "visual.blocks.{}.norm1"),
    **norm("vision.blocks.norm2", "visual.blocks.{}.norm2"),
    **fused_linears(("vision.blocks.query", "vision.blocks.key", "vision.blocks.value"), "visual.blocks.{}.attn.qkv"),
    **linear("vision.blocks.output", "visual.blocks.{}.attn.proj", bias=True),
    **linear("vision.blocks.mlp.up", "visual.blocks.{}.mlp.linear_fc1", bias=True),
    **linear("vision.blocks.mlp.down", "visual.blocks.{}.mlp.linear_fc2", bias=True),
    **norm("vision.merger.norm", "visual.merger.norm"),
    **linear("vision.merger.up", "visual.merger.linear_fc1", bias=True),
    **linear("vision.merger.down", "visual.merger.linear_fc2", bias=True),
    **norm("vision.deepstack.norm", "visual.deepstack_merger_list.{}.norm"),
    **linear("vision.deepstack.up", "visual.deepstack_merger_list.{}.linear_fc1", bias=True),
    **linear("vision.deepstack.down", "visual.deepstack_merger_list.{}.linear_fc2", bias=True),
}


def canonical_key(key: str) -> str:
    """Return the name in `WEIGHT_MAP` of a tensor of any known layout.

    Layouts are `model.language_model` and `model.visual` (as released), and, of a model without output layer, `language_model`
    and `visual`.
    """
    return key.removeprefix("model.")


def stored_key(key: str) -> str:
    """Return the name in transformers' `Qwen3VLModel` of a tensor of `WEIGHT_MAP`; inverse of `canonical_key`."""
    return key
