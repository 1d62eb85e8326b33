"""Where the parameters of Qwen2.5-VL lie in a checkpoint."""

from metaembed_jax.backbones.conversion import fused_linears, linear, same, still_patches

# Every parameter, and the tensor of a checkpoint that it is read from.
KEYS = {
    "embedding": same("model.embed_tokens.weight"),
    "final_norm.scale": same("model.norm.weight"),
    "layers.input_norm.scale": same("model.layers.{}.input_layernorm.weight"),
    "layers.mlp_norm.scale": same("model.layers.{}.post_attention_layernorm.weight"),
    **linear("layers.query", "model.layers.{}.self_attn.q_proj", bias=True),
    **linear("layers.key", "model.layers.{}.self_attn.k_proj", bias=True),
    **linear("layers.value", "model.layers.{}.self_attn.v_proj", bias=True),
    **linear("layers.output", "model.layers.{}.self_attn.o_proj", bias=False),
    **linear("layers.mlp.gate", "model.layers.{}.mlp.gate_proj", bias=False),
    **linear("layers.mlp.up", "model.layers.{}.mlp.up_proj", bias=False),
    **linear("layers.mlp.down", "model.layers.{}.mlp.down_proj", bias=False),
    "vision.patch_embedding.kernel": still_patches("visual.patch_embed.proj.weight"),
    "vision.blocks.norm1.scale": same("visual.blocks.{}.norm1.weight"),
    "vision.blocks.norm2.scale": same("visual.blocks.{}.norm2.weight"),
    **fused_linears(("vision.blocks.query", "vision.blocks.key", "vision.blocks.value"), "visual.blocks.{}.attn.qkv"),
    **linear("vision.blocks.output", "visual.blocks.{}.attn.proj", bias=True),
    **linear("vision.blocks.mlp.gate", "visual.blocks.{}.mlp.gate_proj", bias=True),
    **linear("vision.blocks.mlp.up", "visual.blocks.{}.mlp.up_proj", bias=True),
    **linear("vision.blocks.mlp.down", "visual.blocks.{}.mlp.down_proj", bias=True),
    "vision.merger_norm.scale": same("visual.merger.ln_q.weight"),
    **linear("vision.merger_up", "visual.merger.mlp.0", bias=True),
    **linear("vision.merger_down", "visual.merger.mlp.2", bias=True),
}

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding


def canonical_key(key: str) -> str:
    """The name in `KEYS` of a tensor of any layout in circulation.

    They are `model.layers` and `visual` (as released), `model.language_model.layers` and `model.visual`, and, of a model without
    its output layer, `language_model.layers` and `visual`.
    """
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.", "model.")):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


def stored_key(key: str) -> str:
    """The name of a tensor of `KEYS` in transformers' `Qwen2_5_VLModel`; the way back from `canonical_key`."""
    return key if key.startswith("visual.") else key.replace("model.", "language_model.", 1)
