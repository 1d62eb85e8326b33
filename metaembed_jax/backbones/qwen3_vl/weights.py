"""Where the parameters of Qwen3-VL lie in a checkpoint."""

from metaembed_jax.backbones.conversion import fused_linears, linear, norm, same, still_patches

# Every parameter, and the tensor of a checkpoint that it is read from.
KEYS = {
    "embedding": same("language_model.embed_tokens.weight"),
    "final_norm.scale": same("language_model.norm.weight"),
    "layers.input_norm.scale": same("language_model.layers.{}.input_layernorm.weight"),
    "layers.mlp_norm.scale": same("language_model.layers.{}.post_attention_layernorm.weight"),
    "layers.query_norm.scale": same("language_model.layers.{}.self_attn.q_norm.weight"),
    "layers.key_norm.scale": same("language_model.layers.{}.self_attn.k_norm.weight"),
    **linear("layers.query", "language_model.layers.{}.self_attn.q_proj", bias=False),
    **linear("layers.key", "language_model.layers.{}.self_attn.k_proj", bias=False),
    **linear("layers.value", "language_model.layers.{}.self_attn.v_proj", bias=False),
    **linear("layers.output", "language_model.layers.{}.self_attn.o_proj", bias=False),
    **linear("layers.mlp.gate", "language_model.layers.{}.mlp.gate_proj", bias=False),
    **linear("layers.mlp.up", "language_model.layers.{}.mlp.up_proj", bias=False),
    **linear("layers.mlp.down", "language_model.layers.{}.mlp.down_proj", bias=False),
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

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding


def canonical_key(key: str) -> str:
    """The name in `KEYS` of a tensor of any layout in circulation.

    They are `model.language_model` and `model.visual` (as released), and, of a model without its output layer, `language_model`
    and `visual`.
    """
    return key.removeprefix("model.")


def stored_key(key: str) -> str:
    """The name of a tensor of `KEYS` in transformers' `Qwen3VLModel`."""
    return key
