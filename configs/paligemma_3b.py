"""MetaEmbed on PaliGemma-3B at 448 pixels: the recipe of `configs/7b.py`, with its variants."""

from metaembed_jax.config import load_config, with_keys

ARCHITECTURE = dict(
    text_config=dict(
        model_type="gemma",
        vocab_size=257216,
        hidden_size=2048,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        intermediate_size=16384,
    ),
    vision_config=dict(
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        image_size=448,
        patch_size=14,
    ),
)


def get_config(arg=None):
    """`lora` (the default) or `full`."""
    base = load_config(f"7b:{arg or 'lora'}")
    return with_keys(
        base,
        {
            "name": base.name.replace("7b", "paligemma_3b"),
            "init_from": "google/paligemma-3b-pt-448",
            "model.backbone": "paligemma",
            "model.architecture": ARCHITECTURE,
            "rows.size": (),  # the family's
            "rows.microbatch_rows": 8,
            "rows.recompute": "everything",
            "mesh.fsdp": 1,
        },
    )
