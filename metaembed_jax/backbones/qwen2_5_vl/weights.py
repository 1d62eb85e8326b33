"""The weight map of Qwen2.5-VL, and the names of tensors."""

from metaembed_jax.backbones.weight_map import decoder_layers, fused_linears, linear, same, still_patches

# The tensor of a checkpoint that each parameter is read from.
WEIGHT_MAP = {
    "embedding": same("model.embed_tokens.weight"),
    "final_norm.scale": same("model.norm.weight"),
    **decoder_layers("model.layers.{}", attention_bias=True),
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


def canonical_key(key: str) -> str:
    """Return the name in `WEIGHT_MAP` of a tensor of any known layout.

    Layouts are `model.layers` and `visual` (as released), `model.language_model.layers` and `model.visual`, and, of a model without
    its output layer, `language_model.layers` and `visual`.
    """
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.", "model.")):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


def stored_key(key: str) -> str:
    """Return the name in transformers' `Qwen2_5_VLModel` of a tensor of `WEIGHT_MAP`; inverse of `canonical_key`."""
    return key if key.startswith("visual.") else key.replace("model.", "language_model.", 1)
